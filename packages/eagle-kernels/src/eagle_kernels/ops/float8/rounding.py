"""Matrices rounded to e4m3, and their products: Triton kernels and the tensor cores where a GPU has them, plain torch elsewhere."""

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from eagle_kernels.dispatch import register, use_triton
from eagle_kernels.ops.float8 import reference

MULTIPLE = 16
"""Widths that products of 8-bit floats take: multiples of it. Rows may be any number and are padded with zeros."""
CAPABILITY = (8, 9)
"""The first NVIDIA GPUs that multiply 8-bit floats (Ada); Hopper is 9.0."""

# Tensor cores add products of 8-bit floats with fewer bits than float32, unless partial sums are moved to float32 registers, which
# takes time. Outputs and input gradients are sums over features; weight gradients are sums over all tokens.
FAST_OUTPUT, FAST_INPUT_GRADIENT, FAST_WEIGHT_GRADIENT = True, True, False


class Rounded(NamedTuple):
    """A matrix [R, C] as e4m3 values and float32 scales [R, 1] of its rows."""

    values: Tensor
    scales: Tensor


@functools.cache
def _capable(index: int) -> bool:
    return torch.version.hip is None and torch.cuda.get_device_capability(index) >= CAPABILITY


def float8_hardware(device: torch.device | str) -> bool:
    """Whether matrix products of 8-bit floats run on this device itself; elsewhere rounded values are multiplied in another precision."""
    device = torch.device(device)
    return device.type == "cuda" and _capable(device.index if device.index is not None else torch.cuda.current_device())


def uses_kernels(x: Tensor) -> bool:
    """Whether Triton kernels round `x`."""
    return use_triton(x) and (not x.is_cuda or float8_hardware(x.device))


def padded(rows: int) -> int:
    return -(-rows // MULTIPLE) * MULTIPLE


def _rows(x: Tensor, padded: int) -> tuple[Tensor, Tensor]:
    from eagle_kernels.ops.float8.kernel import launch_rows

    return launch_rows(x, padded)


def _columns(x: Tensor, padded: int) -> tuple[Tensor, Tensor]:
    from eagle_kernels.ops.float8.kernel import launch_columns

    return launch_columns(x, padded)


def _swiglu_rows(gate: Tensor, up: Tensor, padded: int) -> tuple[Tensor, Tensor]:
    from eagle_kernels.ops.float8.kernel import launch_swiglu_rows

    return launch_swiglu_rows(gate, up, padded)


def _swiglu_backward_rows(dout: Tensor, gate: Tensor, up: Tensor, rebuild: bool, padded: int) -> tuple[Tensor, ...]:
    from eagle_kernels.ops.float8.kernel import launch_swiglu_backward_rows

    return launch_swiglu_backward_rows(dout, gate, up, rebuild, padded)


def _like(x: Tensor, rows: int, cols: int) -> tuple[Tensor, Tensor]:
    return x.new_empty(rows, cols, dtype=torch.float8_e4m3fn), x.new_empty(rows, 1, dtype=torch.float32)


register("float8_rows(Tensor x, int padded) -> (Tensor, Tensor)", _rows, lambda x, padded: _like(x, padded, x.shape[1]))
register("float8_columns(Tensor x, int padded) -> (Tensor, Tensor)", _columns, lambda x, padded: _like(x, x.shape[1], padded))
register(
    "float8_swiglu_rows(Tensor gate, Tensor up, int padded) -> (Tensor, Tensor)",
    _swiglu_rows,
    lambda gate, up, padded: _like(gate, padded, gate.shape[1]),
)
register(
    "float8_swiglu_backward_rows(Tensor(a!) dout, Tensor gate, Tensor up, bool rebuild, int padded) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _swiglu_backward_rows,
    lambda dout, gate, up, rebuild, padded: (
        *(gate.new_empty(gate.shape), gate.new_empty(gate.shape if rebuild else 0)),
        *(*_like(gate, padded, gate.shape[1]), *_like(gate, padded, gate.shape[1])),
    ),
)


def by_rows(x: Tensor) -> Rounded:
    """x: [M, K], rounded with a scale for each row; M is padded to a multiple of 16."""
    rounds = torch.ops.eagle_kernels.float8_rows if uses_kernels(x) else reference.rows
    return Rounded(*rounds(x, padded(x.shape[0])))


def by_columns(x: Tensor) -> Rounded:
    """The transposed matrix of x [M, K], rounded with a scale for each column of x; M is padded to a multiple of 16."""
    rounds = torch.ops.eagle_kernels.float8_columns if uses_kernels(x) else reference.columns
    return Rounded(*rounds(x, padded(x.shape[0])))


def swiglu_by_rows(gate: Tensor, up: Tensor) -> Rounded:
    """`by_rows(silu(gate) * up)` by a kernel, without the value between."""
    return Rounded(*torch.ops.eagle_kernels.float8_swiglu_rows(gate, up, padded(gate.shape[0])))


class SwiGLUGradients(NamedTuple):
    """Gradients of gate and up [M, K], the same rounded by rows, and `silu(gate) * up` or an empty tensor."""

    dgate: Tensor
    dup: Tensor
    dgate_rounded: Rounded
    dup_rounded: Rounded
    out: Tensor


def swiglu_backward_by_rows(dout: Tensor, gate: Tensor, up: Tensor, rebuild: bool) -> SwiGLUGradients:
    """By a kernel; dout [M, K] becomes the gradient of gate. rebuild: also `silu(gate) * up`."""
    dout = dout.contiguous()
    dup, out, *rounded = torch.ops.eagle_kernels.float8_swiglu_backward_rows(dout, gate, up, rebuild, padded(len(dout)))
    return SwiGLUGradients(dout, dup, Rounded(*rounded[:2]), Rounded(*rounded[2:]), out)


def product(a: Rounded, b: Rounded, rows: int, dtype: torch.dtype, *, fast: bool) -> Tensor:
    """`a b^T` in `dtype`: the first `rows` rows. a: [M, K], b: [N, K] -> [rows, N]. fast: partial sums may have fewer bits than float32."""
    if dtype == torch.float64 or not float8_hardware(a.values.device):
        out = reference.product(*a, *b, dtype)
    elif 0 in (a.values.shape[0], a.values.shape[1]):
        out = a.scales.new_zeros(a.values.shape[0], b.values.shape[0], dtype=dtype)
    else:
        out = torch._scaled_mm(
            a.values, b.values.t(), scale_a=a.scales, scale_b=b.scales.t(), out_dtype=torch.bfloat16, use_fast_accum=fast
        ).to(dtype)
    return out if len(out) == rows else out[:rows]
