"""Argument checks of the public functions: which argument, what came, what is allowed. None waits for the device unless asked to."""

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INTEGERS = (torch.int64, torch.int32)


def floating(operator: str, **tensors: Tensor) -> None:
    """All of one floating dtype and on one device."""
    (first_name, first), *others = tensors.items()
    if not isinstance(first, Tensor):
        raise TypeError(f"{operator}: {first_name} is a {type(first).__name__}, expected a tensor")
    if first.dtype not in FLOATS:
        raise TypeError(f"{operator}: {first_name} is {first.dtype}, expected one of {', '.join(map(str, FLOATS))}")
    for name, tensor in others:
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{operator}: {name} is a {type(tensor).__name__}, expected a tensor")
        if tensor.dtype != first.dtype:
            raise TypeError(f"{operator}: {name} is {tensor.dtype} and {first_name} is {first.dtype}; cast one of them")
        same_device(operator, **{first_name: first, name: tensor})


def same_device(operator: str, **tensors: Tensor) -> None:
    (first_name, first), *others = tensors.items()
    for name, tensor in others:
        if tensor.device != first.device:
            raise ValueError(f"{operator}: {name} is on {tensor.device} and {first_name} on {first.device}; move one of them")


def shape(operator: str, name: str, tensor: Tensor, expected: tuple[int, ...], why: str) -> None:
    if tuple(tensor.shape) != expected:
        raise ValueError(f"{operator}: {name} has shape {tuple(tensor.shape)}, expected {expected} ({why})")


def integers(operator: str, name: str, tensor: Tensor) -> None:
    if not isinstance(tensor, Tensor) or tensor.dtype not in INTEGERS:
        raise TypeError(f"{operator}: {name} is {getattr(tensor, 'dtype', type(tensor).__name__)}, expected an int64 or int32 tensor")


def gathered(weight: Tensor) -> Tensor:
    """The whole weight: a DTensor (FSDP2, tensor parallel) is gathered and its gradient goes back to the shards."""
    full = getattr(weight, "full_tensor", None)
    return full() if full is not None else weight


def rms_norm(operator: str, x: Tensor, weight: Tensor, residual: Tensor | None = None) -> None:
    if residual is None:
        floating(operator, x=x)
    else:
        floating(operator, x=x, residual=residual)
        shape(operator, "residual", residual, tuple(x.shape), "x's")
    if weight.dtype not in (x.dtype, torch.float32):
        raise TypeError(f"{operator}: weight is {weight.dtype}, expected x's {x.dtype} or torch.float32")
    same_device(operator, x=x, weight=weight)
    if x.ndim == 0:
        raise ValueError(f"{operator}: x has no dimension, expected [..., H]")
    shape(operator, "weight", weight, (x.shape[-1],), "x's last dimension")


def rope(q: Tensor, k: Tensor, positions: Tensor, inv_freq: Tensor) -> None:
    floating("rope", q=q, k=k)
    for name, x in (("q", q), ("k", k)):
        if x.ndim != 3 or x.shape[-1] % 2:
            raise ValueError(f"rope: {name} has shape {tuple(x.shape)}, expected [tokens, heads, an even head dimension]")
    if q.shape[0] != k.shape[0] or q.shape[2] != k.shape[2]:
        raise ValueError(f"rope: q is {tuple(q.shape)} and k {tuple(k.shape)}; tokens and head dimension must agree")
    integers("rope", "positions", positions)
    shape("rope", "positions", positions, (q.shape[0],), "one per token")
    if inv_freq.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"rope: inv_freq is {inv_freq.dtype}, expected torch.float32 (angles lose their meaning in less)")
    shape("rope", "inv_freq", inv_freq, (q.shape[2] // 2,), "half the head dimension")
    same_device("rope", q=q, positions=positions, inv_freq=inv_freq)


def mlp(x: Tensor, w_gate: Tensor, w_up: Tensor, w_down: Tensor, rows: int | None) -> None:
    floating("swiglu_mlp", x=x, w_gate=w_gate, w_up=w_up, w_down=w_down)
    hidden, inner = x.shape[-1], w_gate.shape[0]
    shape("swiglu_mlp", "w_gate", w_gate, (inner, hidden), "[I, H], H from x")
    shape("swiglu_mlp", "w_up", w_up, (inner, hidden), "[I, H], I from w_gate")
    shape("swiglu_mlp", "w_down", w_down, (hidden, inner), "[H, I], I from w_gate")
    if rows is not None and rows < 1:
        raise ValueError(f"swiglu_mlp: rows is {rows}, expected a positive number or None for all at once")


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, token_weights: Tensor | None, denominator: Tensor | float | None,
    label_smoothing: float, z_loss: float, ignore_index: int, num_kept: int | None, validate: bool,
) -> Tensor | None:  # fmt: skip
    """Checks everything and returns the denominator as a 0-dim tensor (or None)."""
    operator = "linear_cross_entropy"
    floating(operator, hidden=hidden)
    if hidden.ndim != 2:
        raise ValueError(f"{operator}: hidden has shape {tuple(hidden.shape)}, expected [tokens, H]; flatten batch and sequence first")
    if weight.dtype not in (hidden.dtype, torch.float32) and not torch.is_autocast_enabled(hidden.device.type):
        raise TypeError(f"{operator}: weight is {weight.dtype}, expected hidden's {hidden.dtype} or torch.float32")
    if weight.ndim != 2 or weight.shape[1] != hidden.shape[1] or weight.shape[0] < 1:
        raise ValueError(f"{operator}: weight has shape {tuple(weight.shape)}, expected [vocabulary, {hidden.shape[1]}]")
    integers(operator, "labels", labels)
    shape(operator, "labels", labels, (hidden.shape[0],), "one per row of hidden")
    same_device(operator, hidden=hidden, weight=weight, labels=labels)
    if token_weights is not None:
        shape(operator, "token_weights", token_weights, (hidden.shape[0],), "one per row of hidden")
        same_device(operator, hidden=hidden, token_weights=token_weights)
        if token_weights.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"{operator}: token_weights is {token_weights.dtype}, expected torch.float32")
        if token_weights.requires_grad:
            raise ValueError(f"{operator}: token_weights requires a gradient, which isn't computed; pass token_weights.detach()")
    if not 0.0 <= label_smoothing < 1.0:
        raise ValueError(f"{operator}: label_smoothing is {label_smoothing}, expected 0 <= label_smoothing < 1")
    if z_loss < 0.0:
        raise ValueError(f"{operator}: z_loss is {z_loss}, expected 0 or more")
    if num_kept is not None and not 0 <= num_kept <= hidden.shape[0]:
        raise ValueError(f"{operator}: num_kept is {num_kept}, expected 0 to {hidden.shape[0]}, the rows of hidden")
    if denominator is not None and not isinstance(denominator, Tensor):
        denominator = torch.tensor(float(denominator), dtype=torch.float32)
    if denominator is not None and denominator.ndim != 0:
        raise ValueError(f"{operator}: denominator has shape {tuple(denominator.shape)}, expected a 0-dim tensor")
    free = hidden.device.type == "cpu" and not torch.compiler.is_compiling()
    if validate or free:
        _labels_in_range(operator, labels, weight.shape[0], ignore_index)
    if validate and num_kept is not None:
        keep = labels != ignore_index
        kept = int((keep if token_weights is None else keep & (token_weights != 0)).sum())
        if kept != num_kept:
            raise ValueError(f"{operator}: num_kept is {num_kept}, but {kept} rows have a label and a weight")
    if denominator is not None and (validate or (denominator.device.type == "cpu" and not torch.compiler.is_compiling())):
        if not float(denominator) > 0.0:
            raise ValueError(f"{operator}: denominator is {float(denominator)}, expected the global sum of weights, more than 0")
    return denominator


def _labels_in_range(operator: str, labels: Tensor, vocab: int, ignore_index: int) -> None:
    wrong = labels[(labels != ignore_index) & ((labels < 0) | (labels >= vocab))]
    if wrong.numel():
        raise ValueError(
            f"{operator}: {wrong.numel()} labels are outside the weight's {vocab} rows, the first is {int(wrong[0])} "
            f"(ignore_index is {ignore_index}; a vocabulary shard must be gathered first)"
        )


def gelu_linear(x: Tensor, weight: Tensor, bias: Tensor | None, approximate: str) -> None:
    if approximate not in ("tanh", "none"):
        raise ValueError(f'gelu_linear: approximate is {approximate!r}, expected "tanh" or "none"')
    if not torch.is_autocast_enabled(x.device.type):
        floating("gelu_linear", **({"x": x, "weight": weight} | ({} if bias is None else {"bias": bias})))
    if weight.ndim != 2 or x.ndim == 0 or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"gelu_linear: x is {tuple(x.shape)} and weight {tuple(weight.shape)}, expected [..., H] and [I, H]")
    if bias is not None:
        shape("gelu_linear", "bias", bias, (weight.shape[0],), "weight's first dimension")
