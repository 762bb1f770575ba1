"""Linear cross-entropy in plain torch."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from eagle_kernels.matmul import wide_dtype

# Logits at once, at most (512 MiB in float32). More rows are processed in chunks, which backward recomputes.
CHUNK_ELEMENTS = 1 << 27


def token_losses(hidden: Tensor, weight: Tensor, labels: Tensor, label_smoothing: float = 0.0, z_loss: float = 0.0) -> Tensor:
    """Unweighted loss of every row. hidden: [N, H], weight: [V, H], labels: [N], all in range -> [N] float32 (float64 for float64)."""
    logits = F.linear(hidden, weight)
    logits = logits.to(wide_dtype(logits.dtype))
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
    """`sum_i w_i l_i / denominator` over the rows whose label is not `ignore_index` and whose weight is not 0. NaN if the number of these
    rows is not `num_kept`.

    hidden: [T, H], weight: [V, H], labels: [T] -> (loss 0-dim, token losses [T] detached, count of kept rows 0-dim int64).
    """
    wide = wide_dtype(hidden.dtype)
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
    scattered = torch.zeros(labels.shape, dtype=wide, device=hidden.device)
    scattered[rows] = losses.detach()
    return loss, scattered, torch.tensor(count, dtype=torch.int64, device=hidden.device)
