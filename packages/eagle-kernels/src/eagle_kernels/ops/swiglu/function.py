"""SwiGLU and the MLP around it: cuBLAS computes the matmuls, and backward recomputes the activation instead of storing it."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from eagle_kernels import checks
from eagle_kernels.dispatch import declare, register, use_triton
from eagle_kernels.matmul import accumulate_, wide_dtype
from eagle_kernels.ops.swiglu import reference
from eagle_kernels.weights import gathered, gradient_dtype, lowered

declare("swiglu", "swiglu_mlp")


def check_mlp(operator: str, x: Tensor, w_gate: Tensor, w_up: Tensor, w_down: Tensor) -> None:
    """Shapes, dtypes and devices of a gated MLP. Raises ValueError or TypeError."""
    checks.floating(operator, x=x, w_gate=w_gate, w_up=w_up, w_down=w_down)
    hidden, inner = x.shape[-1], w_gate.shape[0]
    checks.shape(operator, "w_gate", w_gate, (inner, hidden), "[I, H], H from x")
    checks.shape(operator, "w_up", w_up, (inner, hidden), "[I, H], I from w_gate")
    checks.shape(operator, "w_down", w_down, (hidden, inner), "[H, I], I from w_gate")


def _check_rows(rows: int | None) -> None:
    if rows is not None and (not isinstance(rows, int) or rows < 1):
        raise ValueError(f"swiglu_mlp: rows is {rows!r}, expected a positive whole number, or None for all rows at once")


def _forward(gate: Tensor, up: Tensor) -> Tensor:
    from eagle_kernels.ops.swiglu.kernel import launch_forward

    return launch_forward(gate, up)


def _backward(dout: Tensor, gate: Tensor, up: Tensor, rebuild: bool) -> tuple[Tensor, Tensor, Tensor]:
    from eagle_kernels.ops.swiglu.kernel import launch_backward

    return launch_backward(dout, gate, up, rebuild)


register("swiglu_forward(Tensor gate, Tensor up) -> Tensor", _forward, lambda gate, up: gate.new_empty(gate.shape))
register(
    "swiglu_backward(Tensor dout, Tensor gate, Tensor up, bool rebuild) -> (Tensor, Tensor, Tensor)",
    _backward,
    lambda dout, gate, up, rebuild: (gate.new_empty(gate.shape), gate.new_empty(gate.shape), gate.new_empty(gate.shape if rebuild else 0)),
)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(gate, up)
        return torch.ops.eagle_kernels.swiglu_forward(gate, up)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        gate, up = ctx.saved_tensors
        dgate, dup, _ = torch.ops.eagle_kernels.swiglu_backward(dout, gate, up, False)
        return dgate, dup


def _add_weight_gradients(
    sums: list[Tensor | None], pairs: tuple[tuple[Tensor, Tensor], ...], needed: tuple[bool, ...], dtypes: tuple[torch.dtype, ...]
) -> None:
    """Adds `left^T right` of every pair whose weight needs a gradient to its sum, which the first block makes."""
    for slot, (left, right) in enumerate(pairs):
        if needed[slot]:
            total, first = sums[slot], sums[slot] is None
            if total is None:
                total = sums[slot] = torch.empty((left.shape[1], right.shape[1]), dtype=dtypes[slot], device=left.device)
            accumulate_(total, left.t(), right, first)


class _SwiGLUMLP(torch.autograd.Function):
    """Stores x, gate and up, or (recompute, or rows) only x and computes gate and up again; never the activation."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        x: Tensor,
        w_gate: Tensor,
        w_up: Tensor,
        w_down: Tensor,
        rows: int | None,
        recompute: bool,
        dtypes: tuple[torch.dtype, ...],
    ) -> Tensor:
        ctx.rows, ctx.dtypes = rows, dtypes
        if rows is None:
            gate, up = x @ w_gate.t(), x @ w_up.t()
            ctx.save_for_backward(x, w_gate, w_up, w_down, *(() if recompute else (gate, up)))
            return torch.ops.eagle_kernels.swiglu_forward(gate, up) @ w_down.t()
        ctx.save_for_backward(x, w_gate, w_up, w_down)
        out = torch.empty_like(x)
        for start in range(0, x.shape[0], rows):
            part = x[start : start + rows]
            inner = torch.ops.eagle_kernels.swiglu_forward(part @ w_gate.t(), part @ w_up.t())
            out[start : start + rows] = inner @ w_down.t()
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, w_gate, w_up, w_down, *kept = ctx.saved_tensors
        needed = ctx.needs_input_grad[:4]
        rows = ctx.rows or max(1, x.shape[0])
        # One block needs no running sum: the matmul accumulates in float32 and rounds once, to the gradient's dtype.
        wide = wide_dtype(x.dtype)
        sums: list[Tensor | None] = [
            torch.zeros(weight.shape, dtype=wide, device=weight.device) if need and x.shape[0] == 0 else None
            for weight, need in zip((w_gate, w_up, w_down), needed[1:])
        ]
        dx = torch.empty_like(x) if needed[0] else None
        for start in range(0, x.shape[0], rows):
            part, dpart = x[start : start + rows], dout[start : start + rows]
            gate, up = kept if kept else (part @ w_gate.t(), part @ w_up.t())
            dgate, dup, inner = torch.ops.eagle_kernels.swiglu_backward(dpart @ w_down, gate, up, needed[3])
            del gate, up
            if dx is not None:
                block = dx[start : start + rows]
                torch.mm(dgate, w_gate, out=block)
                torch.addmm(block, dup, w_up, out=block)
            pairs = ((dgate, part), (dup, part), (dpart, inner))
            _add_weight_gradients(sums, pairs, needed[1:], ctx.dtypes if rows >= x.shape[0] else (wide,) * 3)
            del dgate, dup, inner, pairs  # before the next block's are made
        return (dx, *(s.to(dtype) if s is not None else None for s, dtype in zip(sums, ctx.dtypes)), None, None, None)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """`silu(gate) * up`, elementwise (Shazeer 2020), computed in float32 and rounded once. gate and up have one shape and dtype.

    Backward reads gate, up and the incoming gradient once and writes both gradients.
    Raises ValueError or TypeError for shapes, dtypes or devices that do not match.
    """
    checks.floating("swiglu", gate=gate, up=up)
    checks.shape("swiglu", "up", up, tuple(gate.shape), "gate's")
    if use_triton(gate):
        return torch.ops.eagle_kernels.swiglu_forward(gate, up) if not torch.is_grad_enabled() else _SwiGLU.apply(gate, up)
    return reference.swiglu(gate, up)


def swiglu_mlp(x: Tensor, w_gate: Tensor, w_up: Tensor, w_down: Tensor, *, rows: int | None = None, recompute: bool = False) -> Tensor:
    """`swiglu(x w_gate^T, x w_up^T) w_down^T`. x: [..., H], w_gate and w_up: [I, H], w_down: [H, I] (as in `nn.Linear`) -> [..., H].

    rows: process this many rows at a time, forward and backward; backward then recomputes gate and up from x. Memory beyond x, the output
    and the weight gradients is about `6 * rows * I` elements for any number of rows, at the cost of two more matmuls in backward. Weight
    gradients of the blocks are added in float32. None: all rows at once, and gate and up are stored. The torch implementation always
    processes all rows at once.
    recompute: backward computes gate and up again from x, all rows at once, and not the projection by w_down. The torch implementation
    stores its intermediate results anyway.
    Raises ValueError or TypeError for shapes, dtypes or devices that do not match.
    """
    dtypes = tuple(gradient_dtype(weight) for weight in (w_gate, w_up, w_down))
    if torch.is_autocast_enabled(x.device.type):
        x, w_gate, w_up, w_down = lowered(x, w_gate, w_up, w_down)
        with torch.autocast(x.device.type, enabled=False):
            return swiglu_mlp(x, w_gate, w_up, w_down, rows=rows, recompute=recompute)
    check_mlp("swiglu_mlp", x, w_gate, w_up, w_down)
    _check_rows(rows)
    w_gate, w_up, w_down = (gathered(weight) for weight in (w_gate, w_up, w_down))
    if not use_triton(x):
        return reference.swiglu_mlp(x, w_gate, w_up, w_down)
    if rows is None and not torch.is_grad_enabled():
        return F.linear(torch.ops.eagle_kernels.swiglu_forward(F.linear(x, w_gate), F.linear(x, w_up)), w_down)
    out = _SwiGLUMLP.apply(x.reshape(-1, x.shape[-1]), w_gate, w_up, w_down, rows, recompute, dtypes)
    return out.view(x.shape)
