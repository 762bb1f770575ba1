"""Every operator in plain torch: what the CPU runs, what the tests compare with, and the definition of the fused ones.

Arithmetic is done in float32 (float64 for float64 inputs) and rounded once at the end; gradients come from autograd.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

# Above this many logits at once (512 MiB in float32) the cross-entropy goes through the rows in chunks, rebuilt in backward.
CHUNK_ELEMENTS = 1 << 27


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """`x / sqrt(mean(x^2) + eps) * weight` over the last dimension. x: [..., H], weight: [H] -> [..., H] in x's dtype."""
    wide = _wide(x.dtype)
    return F.rms_norm(x.to(wide), (x.shape[-1],), weight.to(wide), eps).to(x.dtype)


def add_rms_norm(residual: Tensor, x: Tensor, weight: Tensor, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    """`(rms_norm(residual + x), residual + x)`; the sum is rounded to the inputs' dtype before it is normalised."""
    total = residual + x
    return rms_norm(total, weight, eps), total


def rope_angles(positions: Tensor, inv_freq: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines of `position * inv_freq`, from float64 angles. positions: [T] int, inv_freq: [D/2] -> two [T, D/2] float64."""
    angles = positions.to(torch.float64)[:, None] * inv_freq.to(torch.float64)
    return angles.cos(), angles.sin()


def rope(q: Tensor, k: Tensor, positions: Tensor, inv_freq: Tensor) -> tuple[Tensor, Tensor]:
    """Rotary embedding, half-rotation convention. q: [T, Hq, D], k: [T, Hk, D], positions: [T], inv_freq: [D/2]."""
    wide = _wide(q.dtype)
    cos, sin = (part.to(wide)[:, None, :] for part in rope_angles(positions, inv_freq))

    def rotate(x: Tensor) -> Tensor:
        first, second = x.to(wide).chunk(2, dim=-1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)

    return rotate(q), rotate(k)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """`silu(gate) * up`, elementwise."""
    wide = _wide(gate.dtype)
    return (F.silu(gate.to(wide)) * up.to(wide)).to(gate.dtype)


def swiglu_mlp(x: Tensor, w_gate: Tensor, w_up: Tensor, w_down: Tensor, *, rows: int | None = None) -> Tensor:
    """`swiglu(x w_gate^T, x w_up^T) w_down^T`. x: [..., H], w_gate and w_up: [I, H], w_down: [H, I]. `rows` changes memory, not values."""
    return F.linear(swiglu(F.linear(x, w_gate), F.linear(x, w_up)), w_down)


def gelu_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, approximate: str = "tanh") -> Tensor:
    """`gelu(x weight^T + bias)`. x: [..., H], weight: [I, H], bias: [I]."""
    return F.gelu(F.linear(x, weight, bias), approximate=approximate)


def token_losses(hidden: Tensor, weight: Tensor, labels: Tensor, label_smoothing: float = 0.0, z_loss: float = 0.0) -> Tensor:
    """Unweighted loss of every row, all of them kept. hidden: [N, H], weight: [V, H], labels: [N] -> [N] float32 (float64 for float64)."""
    logits = F.linear(hidden, weight)
    logits = logits.to(_wide(logits.dtype))
    losses = F.cross_entropy(logits, labels, reduction="none", label_smoothing=label_smoothing)
    if z_loss:
        losses = losses + z_loss * torch.logsumexp(logits, dim=-1).square()
    return losses


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    token_weights: Tensor | None = None,
    denominator: Tensor | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    ignore_index: int = -100,
    num_kept: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`sum_i w_i l_i / denominator` over the rows whose label is not `ignore_index` and whose weight is not 0; NaN where these are not
    `num_kept`.

    hidden: [T, H], weight: [V, H], labels: [T] -> (loss 0-dim, token losses [T] detached, count of kept rows 0-dim int64).
    """
    wide = _wide(hidden.dtype)
    keep = labels != ignore_index
    if token_weights is not None:
        keep = keep & (token_weights != 0)
    rows = keep.nonzero().squeeze(1)
    kept_hidden, kept_labels = hidden[rows], labels[rows].long()
    count = rows.numel()

    step = max(1, CHUNK_ELEMENTS // weight.shape[0])
    if count <= step:
        losses = token_losses(kept_hidden, weight, kept_labels, label_smoothing, z_loss)
    else:
        parts = zip(kept_hidden.split(step), kept_labels.split(step))
        losses = torch.cat(
            [checkpoint(token_losses, part, weight, label, label_smoothing, z_loss, use_reentrant=False) for part, label in parts]
        )
    weights = torch.ones_like(losses) if token_weights is None else token_weights[rows].to(wide)
    total = (losses * weights).sum()
    if denominator is None:
        scale = weights.sum()
        loss = total / torch.where(scale == 0, torch.ones_like(scale), scale)
    elif count == 0:
        loss = total
    else:
        loss = total / denominator.to(device=total.device, dtype=wide)
    if num_kept is not None:
        loss = loss * torch.where(keep.sum() == num_kept, 1.0, torch.nan)
    every = torch.zeros(labels.shape, dtype=wide, device=hidden.device)
    every[rows] = losses.detach()
    return loss, every, torch.tensor(count, dtype=torch.int64, device=hidden.device)
