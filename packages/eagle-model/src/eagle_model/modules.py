"""The model's modules and weights, and the tokens of tiles; `eagle_model.eagle` adds forward and generation."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.siglip.modeling_siglip import SiglipVisionEmbeddings

from eagle_kernels import Recompute
from eagle_model.checkpoint import HEAD, finish_folder, lacks_head
from eagle_model.configuration import EagleConfig
from eagle_model.hub import HUB_OPTIONS
from eagle_model.initial import draws
from eagle_model.language.decoder import LanguageModel
from eagle_model.language.head import Head
from eagle_model.vision.connector import make_connector, pixel_shuffle
from eagle_model.vision.siglip import VisionModel, tiles_at_once

logger = logging.getLogger(__name__)

#: Names of attention kernels that transformers runs the vision tower with; None means its choice.
VISION_KERNELS = (None, "sdpa", "eager")
#: Most tiles that the tower encodes at a time without gradients: 32768 patches of 448-pixel tiles, 0.6 GiB for their widest activation.
ENCODED_TILES = 32


def in_groups(encode: Callable[[Tensor], Tensor], tiles: Tensor, count: int) -> Tensor:
    """`encode(tiles)`, [N, k, H], of `count` tiles at a time, into memory that is taken once; not for gradients."""
    if len(tiles) <= count:
        return encode(tiles)
    features: Tensor | None = None
    for start in range(0, len(tiles), count):
        part = encode(tiles[start : start + count])
        if features is None:
            features = part.new_empty(len(tiles), *part.shape[1:])
        features[start : start + len(part)] = part
    assert features is not None
    return features


class EaglePreTrainedModel(PreTrainedModel):
    """Vision tower, connector and decoder; their tensors have the names of the released checkpoints. `parts` and `blocks` give the modules
    without these names."""

    config_class = EagleConfig
    config: EagleConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    input_modalities = ["image", "text"]  # noqa: RUF012
    _no_split_modules = ["DecoderLayer", "VisionLayer"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_attention_backend = False
    supports_gradient_checkpointing = True
    #: `forward` divides the sum of the losses by `num_items_in_batch`, which transformers' Trainer counts over a whole step.
    accepts_loss_kwargs = True
    _tied_weights_keys = {HEAD: "language_model.model.embed_tokens.weight"}  # noqa: RUF012
    _keys_to_ignore_on_load_unexpected = [r"^vision_model\.vision_model\.head\."]  # noqa: RUF012

    def __init__(self, config: EagleConfig) -> None:
        if config._attn_implementation not in VISION_KERNELS:
            config._attn_implementation = self._check_and_adjust_attn_implementation(config._attn_implementation)
        super().__init__(config)
        vision, text = config.vision_config, config.text_config
        if config.tile_size != vision.image_size:
            raise ValueError(
                f"force_image_size is {config.force_image_size}, but the vision tower has positions for {vision.image_size} pixels; "
                "set vision_config.image_size to the same size and resize its position embedding"
            )
        side = vision.image_size // vision.patch_size
        ratio = config.downsample_ratio
        block = round(1 / ratio) if config.use_pixel_shuffle and 0 < ratio <= 1 else 1
        if config.use_pixel_shuffle and (side % block or not abs(block * ratio - 1) <= 1e-6):
            raise ValueError(f"downsample_ratio {config.downsample_ratio} must be 1/n, and n divide the {side} patches a side of a tile")
        width = vision.hidden_size * block**2
        self.vision_model = VisionModel(vision, config.select_layer)
        self.mlp1 = make_connector(width, text.hidden_size, config.mlp_connector_layers)
        self.language_model = LanguageModel(text)
        #: Kernel of packed attention by its name in eagle-cp; None takes the fastest that runs.
        self.attention_backend: str | None = None
        #: Whether layers are recomputed in backward; set by `set_activation_checkpointing` and `gradient_checkpointing_enable`.
        self.gradient_checkpointing = False
        #: Tiles of a group: backward runs tower and connector again for one group after the other, from the pixels. None: all at once.
        self.vision_group: int | None = None
        self.post_init()

    # ---- parts -------------------------------------------------------------------------------------------------------------------

    def parts(self) -> dict[str, nn.Module]:
        """The three parts that can be trained apart, by name; every parameter is in exactly one of them."""
        return {"vision": self.vision_model, "connector": self.mlp1, "language": self.language_model}

    def blocks(self, part: str | None = None) -> list[nn.Module]:
        """The repeated layers of a part (default: of all parts) in the order in which forward runs them.

        Each is a module that is called through `forward` and owns its parameters, so each can be a unit of FSDP or be recomputed.
        """
        vision, language = list(self.vision_model.vision_model.encoder.layers), list(self.language_model.model.layers)
        return {None: vision + language, "vision": vision, "connector": [], "language": language}[part]

    @property
    def tokens_per_tile(self) -> int:
        """`k`: visual tokens of one tile."""
        return self.config.tokens_per_tile

    # ---- visual tokens -----------------------------------------------------------------------------------------------------------

    def image_features(self, tiles: Tensor) -> Tensor:
        """Tokens of tiles: uint8 [N, s, s, 3] or normalised float [N, 3, s, s] -> [N, k, H].

        With no tiles (N = 0) the tower still runs, on one black tile whose features are dropped: every rank takes part in the
        collectives of sharded parameters, and the tower's gradients exist and are zero.
        """
        real = tiles.shape[0]
        if real == 0:
            tiles = tiles.new_zeros(1, *tiles.shape[1:])
        group = self.vision_group if torch.is_grad_enabled() else None
        if group is None:
            return self._encode(tiles)[:real]
        with Recompute() as again:
            parts = [again(self._encode, part) for part in tiles.split(group)]
        return (parts[0] if len(parts) == 1 else torch.cat(parts))[:real]

    def _encode(self, tiles: Tensor) -> Tensor:
        """Tower and connector, on all tiles at once."""
        return self._connect(self.vision_model(tiles))

    def encode_tiles(self, tiles: Tensor) -> Tensor:
        """`image_features`; without gradients in groups of tiles (`tiles_at_once`), so that memory for activations does not grow with their
        number. Not where parameters are sharded: ranks with different numbers of tiles would run the tower different numbers of times.
        """
        if torch.is_grad_enabled() or any(isinstance(p, DTensor) for p in self.vision_model.parameters()):
            return self.image_features(tiles)
        group = tiles_at_once(self.config.vision_config, next(self.vision_model.parameters()), ENCODED_TILES)
        return in_groups(self.image_features, tiles, group)

    def get_image_features(self, pixel_values: Tensor, return_dict: bool | None = None) -> Any:
        """Features of tiles as transformers' vision-language models return them.

        pixel_values: uint8 [N, s, s, 3] or normalised float [N, 3, s, s]. Gives `last_hidden_state` [N, P, d], the output of the vision
        tower, and `pooler_output` [N, k, H], the visual tokens (`image_features`); with return_dict=False, the two as a tuple.
        """
        hidden = self.vision_model(pixel_values)
        output = BaseModelOutputWithPooling(last_hidden_state=hidden, pooler_output=self._connect(hidden))  # type: ignore[arg-type]
        return output.to_tuple() if return_dict is False else output

    def _connect(self, hidden: Tensor) -> Tensor:
        """Vision hidden states [N, P, d] -> visual tokens [N, k, H]."""
        if self.config.use_pixel_shuffle:
            side = round(hidden.shape[1] ** 0.5)
            hidden = pixel_shuffle(hidden.unflatten(1, (side, side)), self.config.downsample_ratio).flatten(1, 2)
        return self.mlp1(hidden)

    def embed(self, input_ids: Tensor, tiles: Tensor | None, visual_index: Tensor | None = None) -> Tensor:
        """Embeddings [T, H] of flat ids [T], visual tokens replaced by the features of the tiles in order.

        visual_index: int64 [n], positions of the visual tokens; default: searched for in input_ids, which waits for the device.
        Raises ValueError when the number of visual tokens is not that of the features.
        """
        hidden = self.language_model.model.embed_tokens(input_ids)
        if tiles is None:
            return hidden
        if visual_index is None:
            visual_index = (input_ids == self.image_token()).nonzero().squeeze(1)
        return self.place_features(hidden, self.encode_tiles(tiles).flatten(0, 1), visual_index)

    def image_token(self) -> int:
        if self.config.image_token_index is None:
            raise ValueError("config.image_token_index is not set; take it from the tokenizer: convert_tokens_to_ids('<IMG_CONTEXT>')")
        return self.config.image_token_index

    def place_features(self, hidden: Tensor, features: Tensor, index: Tensor) -> Tensor:
        """Embeddings [T, H] with `features` [n, H] at `index` [n]."""
        self.check_features(index.shape[0], features.shape[0])
        # Parts may be on different devices (`device_map`).
        return hidden.index_copy(0, index.to(hidden.device), features.to(hidden))

    def check_features(self, visual_tokens: int, features: int) -> None:
        """Raises ValueError when a prompt of so many visual tokens gets another number of features (a rank's part may end in a tile)."""
        if visual_tokens != features:
            raise ValueError(
                f"{visual_tokens} visual tokens in input_ids, but {features // self.tokens_per_tile} tiles of "
                f"{self.tokens_per_tile} tokens give {features}; the prompt and the tiles must come from the same processor settings"
            )

    # ---- transformers' conventions -----------------------------------------------------------------------------------------------

    def _check_and_adjust_attn_implementation(self, attn_implementation: str | None, *args: Any, **kwargs: Any) -> str:
        """The kernel of the vision tower. Packed attention chooses its own (`attention_backend`), whatever name transformers passes."""
        if attn_implementation in VISION_KERNELS:
            return super()._check_and_adjust_attn_implementation(attn_implementation, *args, **kwargs)
        logger.warning(
            "attn_implementation=%r has no effect: Eagle chooses the attention kernel itself (model.attention_backend names one)",
            attn_implementation,
        )
        return "sdpa"

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.model.embed_tokens

    def set_input_embeddings(self, value: Any) -> None:
        self.language_model.model.embed_tokens = value

    def get_output_embeddings(self) -> nn.Module:
        return self.language_model.lm_head

    def set_output_embeddings(self, new_embeddings: Any) -> None:
        # Resizing makes a plain Linear; the head must stay one that can take its loss.
        head = Head(1, 1, bias=False, device="meta")
        head.weight = new_embeddings.weight
        head.out_features, head.in_features = head.weight.shape
        self.language_model.lm_head = head

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, config: Any = None, **kwargs: Any) -> Any:
        """As in transformers. A local folder that has no head is read as tied, whatever its configuration says."""
        if not isinstance(config, EagleConfig):
            hub = {key: kwargs[key] for key in HUB_OPTIONS if key in kwargs}
            config = EagleConfig.from_pretrained(pretrained_model_name_or_path if config is None else config, **hub)
        if not config.tie_word_embeddings and lacks_head(Path(pretrained_model_name_or_path, kwargs.get("subfolder") or "")):
            config.tie()
        return super().from_pretrained(pretrained_model_name_or_path, *args, config=config, **kwargs)

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """As in transformers; writes a model card where there is none, and files that the umask allows others to read."""
        super().save_pretrained(save_directory, *args, **kwargs)
        finish_folder(save_directory)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Random weights of one module, from the distributions of `eagle_model.initial`."""
        for name, draw in draws(self.config, module).items():
            draw.fill_(module.get_parameter(name))
        if isinstance(module, SiglipVisionEmbeddings):
            init.copy_(module.position_ids, torch.arange(module.position_ids.shape[-1]).expand((1, -1)))
