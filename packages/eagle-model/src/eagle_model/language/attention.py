"""Attention of the decoder: over a packed sequence, or over a padded batch with a key/value cache.

Only the core differs between the two, and `AttentionInputs` says which one runs.
Shapes: T tokens, H hidden size, Hq query heads, Hk key/value heads, D head width, B sequences, L their padded length, K keys.
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.cache_utils import Cache

from eagle_cp import Layout, attention, cached_attention
from eagle_kernels import rms_norm, rope
from eagle_model.float8 import apply_together
from eagle_model.language.spec import DecoderSpec
from eagle_model.pieces import WHOLE, Pieces


@dataclass
class AttentionInputs:
    """What attention needs in addition to the hidden states; the same for every layer.

    positions: int [T]. inv_freq: float32 [D/2]. layout: the pack, for packed attention.
    cache: keys and values of earlier tokens (a transformers `Cache`), or None. rows: [T], where each token stands in the padded batch
    (flat index into B * L); None: all B * L in order. mask: bool [B, 1, L, K], which keys each new token sees. shape: (B, L). With neither
    layout nor mask, the tokens of each row are the last of its first `keys` keys in the cache, none of which is padding.
    backend: kernel of packed attention by its name in eagle-cp; None takes the fastest.
    """

    positions: Tensor
    inv_freq: Tensor
    layout: Layout | None = None
    cache: Cache | None = None
    rows: Tensor | None = None
    mask: Tensor | None = None
    shape: tuple[int, int] = (1, 0)
    backend: str | None = None
    keys: int = 0

    @property
    def exchanged(self) -> bool:
        """Whether attention exchanges queries, keys and values between ranks (Ulysses)."""
        return self.mask is None and self.layout is not None and self.layout.mesh.ulysses.size > 1

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "AttentionInputs":
        """The same with tensors on `device`. accelerate calls it where a model is split over devices (`device_map`)."""
        names = ("positions", "inv_freq", "rows", "mask")
        tensors = {name: value for name in names if (value := getattr(self, name)) is not None}
        return replace(self, **{name: tensor.to(device, non_blocking=non_blocking) for name, tensor in tensors.items()})


class Norm(nn.Module):
    """RMSNorm with a weight [H], by the operator of eagle-kernels."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class Attention(nn.Module):
    """Grouped-query attention with rotary positions; biases, QK-norm and layers without rotation by the spec.

    index: number of the layer, for the spec and the cache.
    """

    def __init__(self, spec: DecoderSpec, index: int, scale_factor: float) -> None:
        super().__init__()
        self.index = index
        self.heads, self.kv_heads, self.width = spec.heads, spec.kv_heads, spec.head_dim
        self.rotated = spec.rotated[index]
        # YaRN scales rotated queries and keys by this factor each, logits by its square.
        self.scale = self.width**-0.5 * (scale_factor**2 if self.rotated else 1.0)
        self.q_proj = nn.Linear(spec.hidden_size, self.heads * self.width, bias=spec.qkv_bias)
        self.k_proj = nn.Linear(spec.hidden_size, self.kv_heads * self.width, bias=spec.qkv_bias)
        self.v_proj = nn.Linear(spec.hidden_size, self.kv_heads * self.width, bias=spec.qkv_bias)
        self.o_proj = nn.Linear(self.heads * self.width, spec.hidden_size, bias=spec.out_bias)
        self.q_norm = Norm(self.width, spec.norm_eps) if spec.qk_norm else None
        self.k_norm = Norm(self.width, spec.norm_eps) if spec.qk_norm else None

    def forward(self, x: Tensor, inputs: AttentionInputs, pieces: Pieces = WHOLE) -> Tensor:
        """x: [T, H] -> [T, H]."""
        q, k, v = pieces.queries(self._project, x)
        q, k = pieces.rotate(self._rotate, q, k, inputs)
        return pieces.output(self.o_proj, pieces.attention(self._attend, q, k, v, inputs))

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x: [T, H] -> q [T, Hq, D], k and v [T, Hk, D]."""
        projected = apply_together((self.q_proj, self.k_proj, self.v_proj), x)
        return tuple(one.view(x.shape[0], -1, self.width) for one in projected)  # type: ignore[return-value]

    def _rotate(self, q: Tensor, k: Tensor, inputs: AttentionInputs) -> tuple[Tensor, Tensor]:
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        return rope(q, k, inputs.positions, inputs.inv_freq) if self.rotated else (q, k)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, inputs: AttentionInputs) -> Tensor:
        """-> [T, Hq * D]."""
        if inputs.layout is not None and inputs.mask is None:
            if inputs.cache is not None:
                inputs.cache.update(self._pad(k, inputs), self._pad(v, inputs), self.index)
            out = attention(q, k, v, inputs.layout, scale=self.scale, backend=inputs.backend)
            return out.reshape(out.shape[0], self.heads * self.width)
        assert inputs.cache is not None
        keys, values = inputs.cache.update(self._pad(k, inputs), self._pad(v, inputs), self.index)
        if inputs.mask is None:
            batch, length = inputs.shape
            new = q.view(batch, length, self.heads, self.width)
            keys, values = (x[:, :, : inputs.keys].transpose(1, 2) for x in (keys, values))
            out = cached_attention(new, keys, values, scale=self.scale, backend=inputs.backend)
        else:
            padded = F.scaled_dot_product_attention(
                self._pad(q, inputs), keys, values, attn_mask=inputs.mask, scale=self.scale, enable_gqa=self.heads != self.kv_heads
            )
            out = padded.transpose(1, 2).flatten(0, 1)
            if inputs.rows is not None:
                out = out[inputs.rows]
        return out.reshape(-1, self.heads * self.width)

    @staticmethod
    def _pad(x: Tensor, inputs: AttentionInputs) -> Tensor:
        """[T, heads, D] -> [B, heads, L, D], zeros where the batch is padded."""
        batch, length = inputs.shape
        if x.shape[0] != batch * length:
            assert inputs.rows is not None
            x = x.new_zeros(batch * length, *x.shape[1:]).index_copy(0, inputs.rows, x)
        return x.view(batch, length, *x.shape[1:]).transpose(1, 2)
