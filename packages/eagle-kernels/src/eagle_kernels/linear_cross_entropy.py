"""The language head and its loss in one operator that never stores more than one chunk of logits."""

from typing import Literal, NamedTuple, overload

import torch
from torch import Tensor

from eagle_kernels import reference


class LinearCrossEntropyResult(NamedTuple):
    """loss: 0-dim; token_losses: [T], unweighted, 0 where ignored, no gradient; count: 0-dim int64, rows that were kept."""

    loss: Tensor
    token_losses: Tensor
    count: Tensor


@overload
def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    token_weights: Tensor | None = None,
    denominator: Tensor | float | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    ignore_index: int = -100,
    num_kept: int | None = None,
    return_details: Literal[False] = False,
    validate: bool = False,
) -> Tensor: ...


@overload
def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    token_weights: Tensor | None = None,
    denominator: Tensor | float | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    ignore_index: int = -100,
    num_kept: int | None = None,
    return_details: Literal[True],
    validate: bool = False,
) -> LinearCrossEntropyResult: ...


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    token_weights: Tensor | None = None,
    denominator: Tensor | float | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    ignore_index: int = -100,
    num_kept: int | None = None,
    return_details: bool = False,
    validate: bool = False,
) -> Tensor | LinearCrossEntropyResult:
    """`sum_i w_i l_i / denominator`, l_i the cross-entropy of `hidden[i] weight^T` with `labels[i]`; labels are not shifted here.

    hidden: [T, H], weight: [V, H], labels: [T] integers, token_weights: [T] float32 (default 1), denominator: 0-dim tensor
    (default: the sum of the weights of the kept rows, a local figure, for convenience). Rows with `ignore_index` or weight 0 cost nothing.
    """
    if denominator is not None and not isinstance(denominator, Tensor):
        denominator = torch.tensor(float(denominator))
    loss, losses, count = reference.linear_cross_entropy(
        hidden,
        weight,
        labels,
        token_weights=token_weights,
        denominator=denominator,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        ignore_index=ignore_index,
    )
    return LinearCrossEntropyResult(loss, losses, count) if return_details else loss
