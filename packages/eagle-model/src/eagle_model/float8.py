"""Linear layers whose matrix products are of 8-bit floats (`eagle_kernels.float8_linears`); their weights stay as they are.

torchao's float8 layers do the same products. They replace a layer's call, round by operations that are fast only when compiled, and know
nothing of the fused MLP; here one kernel rounds each matrix, q, k and v share one rounded input, and so do gate and up.
"""

from collections.abc import Sequence
from typing import Literal

from torch import Tensor, nn

from eagle_kernels import float8_linear, float8_linears
from eagle_model.fused import is_plain

Recipe = Literal["rowwise", "rowwise_with_gw_hp"]
"""What is rounded, by torchao's names. rowwise: both factors of all three products (output, gradients of input and weight).
rowwise_with_gw_hp: not those of the weight's gradient (in high precision). For the input's gradient the weight has a scale for each column
in both; torchao has one for the whole weight in the latter."""


class Float8Linear(nn.Linear):
    """`W x + b` with rounded products. The weight has the name and the precision of the layer that it replaces."""

    def __init__(self, base: nn.Linear, recipe: Recipe) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight, self.bias = base.weight, base.bias
        self.recipe: Recipe = recipe

    @property
    def exact_weight_gradient(self) -> bool:
        return self.recipe == "rowwise_with_gw_hp"

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """x: [..., in] -> [..., out]."""
        return float8_linear(x, self.weight, self.bias, exact_weight_gradient=self.exact_weight_gradient)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, {self.recipe}"


def all_float8(*layers: nn.Module) -> bool:
    """Whether calls of the layers are just those of `Float8Linear`."""
    return all(is_plain(layer, Float8Linear) for layer in layers)


def apply_together(layers: Sequence[nn.Linear], x: Tensor) -> tuple[Tensor, ...]:
    """What each layer makes of x; layers with products of 8-bit floats round it once."""
    if not all_float8(*layers):
        return tuple(layer(x) for layer in layers)
    exact = layers[0].exact_weight_gradient
    return float8_linears(x, [layer.weight for layer in layers], [layer.bias for layer in layers], exact_weight_gradient=exact)  # type: ignore[arg-type]
