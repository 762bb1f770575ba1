"""Kernel: the interface of an attention kernel, and what the kernels share.

Gradients of keys and values can be summed further (over segments, ranks and heads) before they are rounded. `Kernel.backward_wide`
returns a function that adds them to wider tensors. `rounded_gradients` and `add_rows` make such a function for a kernel that returns
gradient tensors.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from eagle_cp.segments import Segments

HALF = (torch.bfloat16, torch.float16)


class Forward(Protocol):
    """Writes `out` and returns the log-sum-exps."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, segments: Segments, causal: bool, scale: float, out: Tensor) -> Tensor: ...


class Backward(Protocol):
    """Writes `dq`, `dk` and `dv`."""

    def __call__(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, segments: Segments, causal: bool, scale: float,
        dq: Tensor, dk: Tensor, dv: Tensor,
    ) -> None: ...  # fmt: skip


class AddGradients(Protocol):
    """Adds the gradient of key `i` to row `rows[i]` of `dk` and `dv` (None: row `i`). `unique`: no row occurs twice."""

    def __call__(self, dk: Tensor, dv: Tensor, rows: Tensor | None = None, unique: bool = True) -> None: ...


class BackwardWide(Protocol):
    """Writes `dq`; the returned function adds the gradients of keys and values."""

    def __call__(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, segments: Segments, causal: bool, scale: float,
        dq: Tensor,
    ) -> AddGradients: ...  # fmt: skip


Unsupported = Callable[[torch.device, torch.dtype, int, bool], str | None]


@dataclass(frozen=True)
class Kernel:
    """Attention of one rank over packed segments, as functions that write into tensors of the caller, which may be strided slices.

    Shapes: `q`, `out`, `dq`, `dout`: `[Tq, Hq, D]`; `k`, `v`, `dk`, `dv`: `[Tk, Hk, D]`; `lse`: `[Hq, Tq]`, float32 (float64 for float64).

    forward(q, k, v, segments, causal, scale, out) -> lse
    backward(dout, q, k, v, out, lse, segments, causal, scale, dq, dk, dv)
    backward_wide(dout, q, k, v, out, lse, segments, causal, scale, dq) -> add_to
        `add_to(dk, dv, rows, unique)` adds to float32 (float64) tensors, if possible before the kernel rounds its gradients.
    unsupported(device, dtype, head_dim, causal) -> the reason why the kernel can't run there, or None

    Under `torch.use_deterministic_algorithms(True)` a kernel adds in one order, or `unsupported` says that it can't.
    """

    name: str
    forward: Forward
    backward: Backward
    backward_wide: BackwardWide
    unsupported: Unsupported


@functools.cache
def capability(index: int | None) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def needs_cuda_half(device: torch.device, dtype: torch.dtype, major: int, why: str) -> str | None:
    """The reason why a kernel for half precision on GPUs of compute capability `major`.0 or higher can't run, or None."""
    if device.type != "cuda":
        return f"needs CUDA tensors, got {device.type}"
    if dtype not in HALF:
        return f"takes bfloat16 or float16, not {dtype_name(dtype)}"
    if capability(device.index)[0] < major:
        return f"needs compute capability {major}.0 {why}, this GPU has {'.'.join(map(str, capability(device.index)))}"
    return None


@functools.cache
def find(module: str, *names: str) -> Any:
    """`module` if it can be imported and has `names`, else None."""
    try:
        if importlib.util.find_spec(module.split(".")[0]) is None:
            return None
        found = importlib.import_module(module)
    except ImportError:
        return None
    return found if all(hasattr(found, name) for name in names) else None


def rounded_gradients(
    backward: Backward, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, segments: Segments, causal: bool,
    scale: float, dq: Tensor,
) -> AddGradients:  # fmt: skip
    """`backward_wide` of a kernel that returns its gradients only rounded."""
    dk, dv = torch.empty(k.shape, dtype=k.dtype, device=k.device), torch.empty(v.shape, dtype=v.dtype, device=v.device)
    backward(dout, q, k, v, out, lse, segments, causal, scale, dq, dk, dv)
    return functools.partial(add_rows, (dk, dv))


def add_rows(parts: Sequence[Tensor], dk: Tensor, dv: Tensor, rows: Tensor | None = None, unique: bool = True) -> None:
    """`AddGradients` from the gradient tensors `parts` (of keys, of values)."""
    for target, part in zip((dk, dv), parts):
        if rows is None:
            target.add_(part)
        else:
            target.index_add_(0, rows, part.to(target.dtype))
