"""The language head and its loss, which never holds the logits of a whole sequence."""

from typing import Any, Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eagle_kernels import linear_cross_entropy
from eagle_model.fused import is_plain_weight


class Head(nn.Linear):
    """The language head: logits, or the loss without ever holding the logits of a whole sequence."""

    def forward(self, hidden: Tensor, targets: Tensor | None = None, **options: Any) -> Tensor:  # type: ignore[override]
        """hidden: [..., H] -> logits [..., V]; with targets [T] -> loss, `options` being those of `eagle_kernels.linear_cross_entropy`."""
        if targets is None:
            return F.linear(hidden, self.weight)
        return linear_cross_entropy(hidden, self.weight, targets, **options)


@overload
def head_loss(
    head: nn.Module, hidden: Tensor, targets: Tensor, *, token_weights: Tensor | None = None, denominator: Tensor | None = None,
    num_kept: int | None = None, token_losses: Literal[False] = False,
) -> Tensor: ...  # fmt: skip


@overload
def head_loss(
    head: nn.Module, hidden: Tensor, targets: Tensor, *, token_weights: Tensor | None = None, denominator: Tensor | None = None,
    num_kept: int | None = None, token_losses: Literal[True],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip


def head_loss(
    head: nn.Module,
    hidden: Tensor,
    targets: Tensor,
    *,
    token_weights: Tensor | None = None,
    denominator: Tensor | None = None,
    num_kept: int | None = None,
    token_losses: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Loss of hidden states [T, H] and targets [T] through the head: `sum_i w_i l_i / denominator`, 0-dim float32; with token_losses also
    the `l_i` [T], 0 where ignored, without gradient.

    Arguments are those of `eagle_kernels.linear_cross_entropy`, which computes it for the model's own `Head`. A head that something else
    has replaced or wrapped (an adapter, a quantised layer) is called; the logits of all labelled tokens are then in memory at once.
    """
    if isinstance(head, Head) and "forward" not in head.__dict__ and is_plain_weight(head._parameters.get("weight")):
        options = {"token_weights": token_weights, "denominator": denominator, "num_kept": num_kept}
        if not token_losses:
            return head(hidden, targets, **options)
        loss, own, _ = head(hidden, targets, **options, return_details=True)
        return loss, own
    kept = targets != -100
    losses = F.cross_entropy(head(hidden[kept]).float(), targets[kept], reduction="none")
    weights = torch.ones_like(losses) if token_weights is None else token_weights[kept].to(losses)
    loss = (losses * weights).sum() / (weights.sum() if denominator is None else denominator)
    if not token_losses:
        return loss
    return loss, torch.zeros(targets.shape, dtype=losses.dtype, device=losses.device).masked_scatter(kept, losses.detach())


def token_scores(head: nn.Module, hidden: Tensor, targets: Tensor, *, rows: int = 512) -> tuple[Tensor, Tensor]:
    """Negative log-likelihood of every target in nats, float32 [T], and whether it is the most likely token, bool [T].

    hidden: [T, H]. targets: int64 [T]; where they are -100 the results are 0 and False. No gradients; the logits of `rows` tokens are in
    memory at a time.
    """
    losses = torch.zeros(len(targets), dtype=torch.float32, device=hidden.device)
    right = torch.zeros(len(targets), dtype=torch.bool, device=hidden.device)
    with torch.no_grad():
        for part in (targets != -100).nonzero().squeeze(1).split(rows):
            logits = head(hidden[part]).float()
            losses[part] = F.cross_entropy(logits, targets[part], reduction="none")
            right[part] = logits.argmax(-1) == targets[part]
    return losses, right
