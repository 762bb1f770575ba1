"""The gated MLP of the decoder, through one fused operator where its projections are plain linears, or all have 8-bit products."""

from collections.abc import Callable
from functools import partial

from torch import Tensor, nn

from eagle_kernels import float8_mlp, swiglu, swiglu_mlp
from eagle_kernels.dispatch import use_triton
from eagle_model.float8 import all_float8, apply_together
from eagle_model.fused import is_plain_linear
from eagle_model.language.spec import DecoderSpec
from eagle_model.pieces import WHOLE, Pieces


class GatedMLP(nn.Module):
    """`down(silu(gate(x)) * up(x))`; one fused operator when all three are plain linears without biases."""

    def __init__(self, spec: DecoderSpec) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(spec.hidden_size, spec.intermediate_size, bias=spec.mlp_bias)
        self.up_proj = nn.Linear(spec.hidden_size, spec.intermediate_size, bias=spec.mlp_bias)
        self.down_proj = nn.Linear(spec.intermediate_size, spec.hidden_size, bias=spec.mlp_bias)
        #: Rows that the fused operator works on at a time, and for which backward computes gate and up again; None: all. Without effect
        #: where gate and up are kept.
        self.rows: int | None = None

    def forward(self, x: Tensor, pieces: Pieces = WHOLE) -> Tensor:
        gate, up, down = self.gate_proj, self.up_proj, self.down_proj
        again = not pieces.keeps_gate
        fused: Callable[..., Tensor] | None = None
        if is_plain_linear(gate) and is_plain_linear(up) and is_plain_linear(down):
            blocks = self.rows if self.rows is not None and self.rows < x.shape[0] and (again or pieces is WHOLE) else None
            again = again or blocks is not None
            fused = partial(swiglu_mlp, rows=blocks)
        elif all_float8(gate, up, down):
            fused = partial(float8_mlp, exact_weight_gradient=gate.exact_weight_gradient)  # type: ignore[arg-type]
        # The torch implementation of the fused operators keeps their intermediate results; in pieces it does not.
        if fused is not None and gate.bias is None and (pieces is WHOLE or use_triton(x)):
            return fused(x, gate.weight, up.weight, down.weight, recompute=again)
        return down(pieces.cheap(swiglu, *pieces.mlp(self._gate_and_up, x)))

    def _gate_and_up(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return apply_together((self.gate_proj, self.up_proj), x)  # type: ignore[return-value]
