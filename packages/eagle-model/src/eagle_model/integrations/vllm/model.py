"""Eagle 2.5 in vLLM: SigLIP and the language model are vLLM's own, connector, pixel shuffle and normalisation those of `eagle_model`.

Shapes: N tiles of s x s pixels, k visual tokens a tile, H hidden size of the language model.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.model_executor.models.interfaces import SupportsLoRA, SupportsMultiModal, SupportsPP
from vllm.model_executor.models.module_mapping import MultiModelKeys
from vllm.model_executor.models.siglip import SiglipVisionModel
from vllm.model_executor.models.utils import AutoWeightsLoader, init_vllm_registered_model, maybe_prefix
from vllm.multimodal import MULTIMODAL_REGISTRY

from eagle_model.integrations.vllm.processing import EagleDummyInputs, EagleMultiModalProcessor, EagleProcessingInfo
from eagle_model.vision.connector import make_connector, pixel_shuffle
from eagle_model.vision.siglip import normalised, tiles_at_once

#: Most tiles that the tower takes at once. At 1024 patches of width 4304 in bfloat16 their MLP needs 0.6 GB, however long a video is.
TILES_AT_ONCE = 64


@MULTIMODAL_REGISTRY.register_processor(EagleMultiModalProcessor, info=EagleProcessingInfo, dummy_inputs=EagleDummyInputs)
class EagleForVllm(nn.Module, SupportsMultiModal, SupportsPP, SupportsLoRA):
    """The model that vLLM runs for `Eagle2_5_VLForConditionalGeneration`; weights have the names of the released checkpoints."""

    packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}  # noqa: RUF012

    @classmethod
    def get_placeholder_str(cls, modality: str, i: int) -> str | None:
        if modality not in ("image", "video"):
            raise ValueError(f"{modality} is not supported; Eagle takes images and videos")
        return f"<{modality}-{i}>"

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config = vllm_config.model_config.hf_config
        vision, text = config.vision_config, config.text_config
        self.config = config
        layers, select = vision.num_hidden_layers, config.select_layer
        depth = layers + 1 + select if select < 0 else select
        if not 0 < depth <= layers:
            raise ValueError(f"select_layer is {select}, but the vision tower has {layers} layers")
        block = round(1 / config.downsample_ratio) if config.use_pixel_shuffle else 1
        with self._mark_tower_model(vllm_config, {"image", "video"}):
            self.vision_model = SiglipVisionModel(
                vision,
                quant_config=vllm_config.quant_config,
                num_hidden_layers_override=depth,
                require_post_norm=select == -1,
                use_head=False,
                prefix=maybe_prefix(prefix, "vision_model"),
            )
            self.mlp1 = make_connector(vision.hidden_size * block**2, text.hidden_size, config.mlp_connector_layers)
        with self._mark_language_model(vllm_config):
            self.language_model = init_vllm_registered_model(
                vllm_config=vllm_config, hf_config=text, prefix=maybe_prefix(prefix, "language_model")
            )
        self.make_empty_intermediate_tensors = self.language_model.make_empty_intermediate_tensors

    def image_features(self, tiles: Tensor) -> Tensor:
        """Visual tokens of tiles: uint8 [N, s, s, 3] -> [N, k, H]."""
        dtype = self.vision_model.dtype
        group = tiles_at_once(self.config.vision_config, next(self.vision_model.parameters()), TILES_AT_ONCE)
        features = []
        for some in tiles.split(group):
            hidden = self.vision_model(pixel_values=normalised(some).to(dtype))
            if self.config.use_pixel_shuffle:
                side = round(hidden.shape[1] ** 0.5)
                hidden = pixel_shuffle(hidden.unflatten(1, (side, side)), self.config.downsample_ratio).flatten(1, 2)
            features.append(self.mlp1(hidden))
        return torch.cat(features)

    def embed_multimodal(self, **kwargs: Any) -> list[Tensor]:
        """Visual tokens [n k, H] of each image and video, from `image_tiles`, `image_counts`, `video_tiles` and `video_counts`."""
        result: list[Tensor] = []
        for kind in ("image", "video"):
            tiles, counts = kwargs.get(f"{kind}_tiles"), kwargs.get(f"{kind}_counts")
            if tiles is None or counts is None:
                continue
            tiles = torch.cat(list(tiles)) if isinstance(tiles, list | tuple) else tiles
            sizes = [int(count) for count in torch.as_tensor(counts).flatten()]
            result += [block.flatten(0, 1) for block in self.image_features(tiles).split(sizes)]
        return result

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        if intermediate_tensors is not None:
            inputs_embeds = None
        return self.language_model.model(input_ids, positions, intermediate_tensors, inputs_embeds=inputs_embeds)

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        return self.language_model.compute_logits(hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        return AutoWeightsLoader(self).load_weights(weights)

    def get_mm_mapping(self) -> MultiModelKeys:
        return MultiModelKeys.from_string_field(language_model="language_model", connector="mlp1", tower_model="vision_model")
