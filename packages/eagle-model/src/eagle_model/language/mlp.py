"""The gated MLP of the decoder, through one fused operator where its projections are plain linears."""

from torch import Tensor, nn

from eagle_kernels import swiglu, swiglu_mlp
from eagle_model.fused import is_plain_linear
from eagle_model.language.spec import DecoderSpec


class GatedMLP(nn.Module):
    """`down(silu(gate(x)) * up(x))`; one fused operator when all three are plain linears without biases."""

    def __init__(self, spec: DecoderSpec) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(spec.hidden_size, spec.intermediate_size, bias=spec.mlp_bias)
        self.up_proj = nn.Linear(spec.hidden_size, spec.intermediate_size, bias=spec.mlp_bias)
        self.down_proj = nn.Linear(spec.intermediate_size, spec.hidden_size, bias=spec.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        gate, up, down = self.gate_proj, self.up_proj, self.down_proj
        if is_plain_linear(gate) and is_plain_linear(up) and is_plain_linear(down) and gate.bias is None:
            return swiglu_mlp(x, gate.weight, up.weight, down.weight)
        return down(swiglu(gate(x), up(x)))
