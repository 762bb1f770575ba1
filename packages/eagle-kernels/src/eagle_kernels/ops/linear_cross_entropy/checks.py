"""Argument checks of linear cross-entropy. Nothing waits for the device unless `validate` is set."""

import torch
from torch import Tensor

from eagle_kernels.checks import floating, integers, same_device, shape

OPERATOR = "linear_cross_entropy"


def check(
    hidden: Tensor, weight: Tensor, labels: Tensor, token_weights: Tensor | None, denominator: Tensor | float | None,
    label_smoothing: float, z_loss: float, ignore_index: int, num_kept: int | None, validate: bool,
) -> Tensor | None:  # fmt: skip
    """Check all arguments and return the denominator as a 0-dim tensor (or None). Raises ValueError or TypeError.

    Values on a CPU are always checked; values on another device only with `validate`, which waits for it.
    """
    _check_tensors(hidden, weight, labels, token_weights)
    if not 0.0 <= label_smoothing < 1.0:
        raise ValueError(f"{OPERATOR}: label_smoothing is {label_smoothing}, expected 0 <= label_smoothing < 1")
    if not 0.0 <= z_loss < float("inf"):
        raise ValueError(f"{OPERATOR}: z_loss is {z_loss}, expected 0 or more")
    if num_kept is not None and not 0 <= num_kept <= labels.numel():
        raise ValueError(f"{OPERATOR}: num_kept is {num_kept}, expected 0 to {labels.numel()}, the rows of hidden")
    if denominator is not None and not isinstance(denominator, Tensor):
        denominator = torch.tensor(float(denominator), dtype=torch.float32)
    if denominator is not None and denominator.ndim != 0:
        raise ValueError(f"{OPERATOR}: denominator has shape {tuple(denominator.shape)}, expected a 0-dim tensor")
    if validate or (hidden.device.type == "cpu" and not torch.compiler.is_compiling()):
        _check_labels(labels, weight.shape[0], ignore_index)
    if validate and num_kept is not None:
        keep = labels != ignore_index
        kept = int((keep if token_weights is None else keep & (token_weights != 0)).sum())
        if kept != num_kept:
            raise ValueError(f"{OPERATOR}: num_kept is {num_kept}, but {kept} rows have a label and a weight")
    if denominator is not None and (validate or (denominator.device.type == "cpu" and not torch.compiler.is_compiling())):
        if not float(denominator) > 0.0:
            raise ValueError(f"{OPERATOR}: denominator is {float(denominator)}, expected the global sum of weights, more than 0")
    return denominator


def _check_tensors(hidden: Tensor, weight: Tensor, labels: Tensor, token_weights: Tensor | None) -> None:
    floating(OPERATOR, hidden=hidden)
    if hidden.ndim < 2:
        raise ValueError(f"{OPERATOR}: hidden has shape {tuple(hidden.shape)}, expected [..., H] with at least one dimension of rows")
    if weight.dtype not in (hidden.dtype, torch.float32) and not torch.is_autocast_enabled(hidden.device.type):
        raise TypeError(f"{OPERATOR}: weight is {weight.dtype}, expected hidden's {hidden.dtype} or torch.float32")
    if weight.ndim != 2 or weight.shape[1] != hidden.shape[-1] or weight.shape[0] < 1:
        raise ValueError(f"{OPERATOR}: weight has shape {tuple(weight.shape)}, expected [vocabulary, {hidden.shape[-1]}]")
    integers(OPERATOR, "labels", labels)
    shape(OPERATOR, "labels", labels, tuple(hidden.shape[:-1]), "one per row of hidden")
    same_device(OPERATOR, hidden=hidden, weight=weight, labels=labels)
    if token_weights is not None:
        shape(OPERATOR, "token_weights", token_weights, tuple(hidden.shape[:-1]), "one per row of hidden")
        same_device(OPERATOR, hidden=hidden, token_weights=token_weights)
        if token_weights.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"{OPERATOR}: token_weights is {token_weights.dtype}, expected torch.float32")
        if token_weights.requires_grad:
            raise ValueError(f"{OPERATOR}: token_weights requires a gradient, which is not computed; pass token_weights.detach()")


def _check_labels(labels: Tensor, vocab: int, ignore_index: int) -> None:
    wrong = labels[(labels != ignore_index) & ((labels < 0) | (labels >= vocab))]
    if wrong.numel():
        raise ValueError(
            f"{OPERATOR}: {wrong.numel()} labels are outside the weight's {vocab} rows, the first is {int(wrong[0])} "
            f"(ignore_index is {ignore_index}; gather a sharded vocabulary first)"
        )
