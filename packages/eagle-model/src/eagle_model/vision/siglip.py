"""The vision tower: embeddings and layers of transformers' SigLIP, without the pooling head.

Shapes: N tiles of s x s pixels, P patches of p x p pixels a tile, d vision width.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import SiglipVisionConfig
from transformers.models.siglip.modeling_siglip import SiglipEncoderLayer, SiglipVisionEmbeddings, eager_attention_forward

from eagle_kernels import Recompute
from eagle_model.fused import is_plain
from eagle_model.pieces import Pieces

#: Largest block that glibc's malloc keeps for the next allocation (DEFAULT_MMAP_THRESHOLD_MAX). Larger ones are mapped, filled with zeros
#: and given back each time: 194 ms a tile instead of 173 for 14 tiles at once in 6 float32 layers of width 384 (2 cores).
MALLOC_KEEPS = 32 << 20


def tiles_at_once(config: SiglipVisionConfig, weight: Tensor, most: int) -> int:
    """Tiles to encode at a time without gradients: `most`, and on a CPU at most so many that the MLP's activation is a block that malloc
    keeps. weight: any of the tower's, for its device and dtype."""
    if weight.device.type != "cpu":
        return most
    image, patch = config.image_size, config.patch_size
    assert isinstance(image, int)
    assert isinstance(patch, int)
    return max(min(MALLOC_KEEPS // ((image // patch) ** 2 * config.intermediate_size * weight.element_size()), most), 1)


def patches_of(pixels: Tensor, side: int) -> Tensor:
    """Pixels cut into flat patches, values normalised with mean = std = 0.5: float [N, P, 3 * side * side], channels first in a patch.

    pixels: uint8 [N, s, s, 3], or float [N, 3, s, s] that is normalised already. Pixels beyond the last whole patch are cut off, as in the
    convolution that this replaces.
    """
    channels_last = pixels.dtype == torch.uint8
    height, width = (size // side * side for size in (pixels.shape[1:3] if channels_last else pixels.shape[2:]))
    if channels_last:
        cut = pixels[:, :height, :width].unflatten(2, (-1, side)).unflatten(1, (-1, side)).permute(0, 1, 3, 5, 2, 4)
        return cut.reshape(len(pixels), -1, 3 * side * side).float().div_(127.5).sub_(1.0)
    cut = pixels[..., :height, :width].unflatten(3, (-1, side)).unflatten(2, (-1, side)).permute(0, 2, 4, 1, 3, 5)
    return cut.reshape(len(pixels), -1, 3 * side * side)


def normalised(pixels: Tensor) -> Tensor:
    """Pixels [N, 3, s, s] with mean = std = 0.5, float32, from uint8 [N, s, s, 3]; floats are normalised already and stay as they are."""
    return pixels.permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0) if pixels.dtype == torch.uint8 else pixels


class VisionLayer(SiglipEncoderLayer):
    """SigLIP's layer. `kept`, a level of `eagle_kernels.memory`, recomputes in backward the pieces that this level does not keep."""

    kept: int | None = None

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:  # type: ignore[override]
        if self.kept is None or attention_mask is not None or not torch.is_grad_enabled():
            return super().forward(hidden_states, attention_mask, **kwargs)  # type: ignore[arg-type]
        with Recompute() as again:
            return self._in_pieces(hidden_states, Pieces(again, self.kept))

    def _in_pieces(self, hidden: Tensor, pieces: Pieces) -> Tensor:
        """hidden: [N, P, d] -> [N, P, d]; the same operations as SigLIP's."""
        mlp = self.mlp
        q, k, v = pieces.queries(self._project, pieces.cheap(self.layer_norm1, hidden))
        mixed = pieces.output(self.self_attn.out_proj, pieces.attention(self._attend, q, k, v))
        normed, hidden = pieces.cheap(self._add_norm, hidden, mixed)
        return hidden + mlp.fc2(pieces.cheap(mlp.activation_fn, pieces.mlp(mlp.fc1, normed)))

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x: [N, P, d] -> q, k, v [N, heads, P, d / heads]."""
        attention = self.self_attn
        projected = attention.q_proj(x), attention.k_proj(x), attention.v_proj(x)
        return tuple(one.unflatten(-1, (-1, attention.head_dim)).transpose(1, 2) for one in projected)  # type: ignore[return-value]

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """-> [N, P, d]."""
        attention = self.self_attn
        if attention.config._attn_implementation == "eager":
            out, _ = eager_attention_forward(attention, q, k, v, None, scaling=attention.scale)
        else:
            out = F.scaled_dot_product_attention(q, k, v, scale=attention.scale).transpose(1, 2)
        return out.flatten(2)

    def _add_norm(self, hidden: Tensor, mixed: Tensor) -> tuple[Tensor, Tensor]:
        """The second norm of the sum, and the sum."""
        hidden = hidden + mixed
        return self.layer_norm2(hidden), hidden


class Encoder(nn.Module):
    """The layers, under the names of SigLIP's weights."""

    def __init__(self, config: SiglipVisionConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(VisionLayer(config) for _ in range(config.num_hidden_layers))


class VisionTower(nn.Module):
    """SigLIP's embeddings and layers: pixels -> hidden states of the selected layer, [N, P, d]."""

    def __init__(self, config: SiglipVisionConfig, select_layer: int) -> None:
        super().__init__()
        layers = config.num_hidden_layers
        # Hidden state i is the output of i layers; -1 is the last one after the post-layernorm.
        self.depth = layers + 1 + select_layer if select_layer < 0 else select_layer
        if not isinstance(select_layer, int) or not 0 <= self.depth <= layers:
            raise ValueError(f"select_layer is {select_layer}, but the vision tower has {layers} layers")
        self.normed = select_layer == -1
        if config.attention_dropout:
            raise ValueError(f"vision_config.attention_dropout is {config.attention_dropout}; dropout is not supported, set it to 0")
        if config._attn_implementation is None:
            # SigLIP's attention reads this field, which transformers sets only for its own models.
            config._attn_implementation = "sdpa"
        if not isinstance(config.patch_size, int):
            raise ValueError(f"vision_config.patch_size is {config.patch_size}; patches must be square, give one number")
        self.patch_size = config.patch_size
        self.embeddings = SiglipVisionEmbeddings(config)
        self.encoder = Encoder(config)
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.checkpoint: Callable[..., Tensor] | None = None
        self.checkpoint_every = 1
        for module in self.encoder.modules():
            if isinstance(module, nn.Linear):
                module.xavier = True  # type: ignore[assignment] # SigLIP's initialisation of random weights

    def forward(self, pixels: Tensor) -> Tensor:
        """pixels: uint8 [N, s, s, 3] or normalised float [N, 3, s, s] -> [N, P, d]."""
        hidden = self.embed(pixels)
        recompute = self.checkpoint if torch.is_grad_enabled() else None
        for index, layer in enumerate(self.encoder.layers[: self.depth]):
            if recompute is None or index % self.checkpoint_every:
                hidden = layer(hidden, None)
            else:
                hidden = recompute(layer, hidden, None)
        return self.post_layernorm(hidden) if self.normed else hidden

    def embed(self, pixels: Tensor) -> Tensor:
        """Patch and position embeddings: pixels as in `forward` -> [N, P, d]. Raises ValueError for tiles of another size or form."""
        patch, table = self.embeddings.patch_embedding, self.embeddings.position_embedding
        channels = pixels.shape[3] if pixels.dtype == torch.uint8 and pixels.ndim == 4 else pixels.shape[1] if pixels.ndim == 4 else 0
        if channels != 3:
            raise ValueError(
                f"pixels are {pixels.dtype} {tuple(pixels.shape)}; need tiles as uint8 [N, s, s, 3], as the processor makes them, or "
                "normalised floats [N, 3, s, s]"
            )
        height, width = pixels.shape[1:3] if pixels.dtype == torch.uint8 else pixels.shape[2:]
        count = (height // self.patch_size) * (width // self.patch_size)
        if count != self.embeddings.num_positions:
            raise ValueError(
                f"tiles of {tuple(pixels.shape[1:])} give {count} patches; the tower has {self.embeddings.num_positions} positions"
            )
        if is_plain(patch, nn.Conv2d) and is_plain(table, nn.Embedding):
            # A convolution with stride = kernel is a matrix product over patches.
            patches = patches_of(pixels, self.patch_size).to(patch.weight.dtype)
            return F.linear(patches, patch.weight.flatten(1), patch.bias) + table.weight
        positions = table(torch.arange(count, device=pixels.device))
        return patch(normalised(pixels).to(positions.dtype)).flatten(2).transpose(1, 2) + positions


class VisionModel(nn.Module):
    """The tower under the prefix `vision_model.vision_model` of the released weights."""

    def __init__(self, config: SiglipVisionConfig, select_layer: int) -> None:
        super().__init__()
        self.vision_model = VisionTower(config, select_layer)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.vision_model(pixels)
