"""torchao's float8 layers, which emulate 8-bit products on a CPU: the same scales, rounded values and products as ours."""

import dataclasses

import pytest
import torch
from torch import nn

pytest.importorskip("torchao")
from torchao.float8 import Float8LinearConfig
from torchao.float8.float8_linear import Float8Linear as Theirs

from eagle_model.float8 import Float8Linear

NARROW, WIDE = 96, 176


def results(layer, x, dout):
    """Output and gradients of x, weight and bias."""
    x = x.clone().requires_grad_()
    out = layer(x)
    return dict(zip(("out", "x", "weight", "bias"), (out, *torch.autograd.grad(out, (x, layer.weight, layer.bias), dout))))


def relative_error(found, expected):
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


def run(recipe, dtype, features=(0, 0)):
    """Results of our layer, of torchao's, and of the layer without rounding. features: the weight's columns go from 10^first to 10^last."""
    generator = torch.Generator().manual_seed(0)
    base = nn.Linear(NARROW, WIDE)
    with torch.no_grad():
        base.weight.copy_(torch.randn(WIDE, NARROW, generator=generator) * torch.logspace(-3, 0, WIDE)[:, None])
        base.weight.mul_(torch.logspace(*features, NARROW))
    x = torch.randn(3, 7, NARROW, generator=generator) * torch.logspace(-1, 2, NARROW)
    dout = torch.randn(3, 7, WIDE, generator=generator) * torch.logspace(-4, -1, 21).view(3, 7, 1)
    base, x, dout = (one.to(dtype) for one in (base, x, dout))
    config = dataclasses.replace(Float8LinearConfig.from_recipe_name(recipe), emulate=True)
    ours = results(Float8Linear(base, recipe), x, dout)
    theirs = results(Theirs.from_float(base, config), x, dout)
    return ours, theirs, results(base.float(), x.float(), dout.float())


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2**-8)])
@pytest.mark.parametrize("recipe", ["rowwise", "rowwise_with_gw_hp"])
def test_output_and_gradients_are_those_of_torchao(recipe, dtype, tolerance):
    ours, theirs, exact = run(recipe, dtype)
    for name in ours:
        if (recipe, name) != ("rowwise_with_gw_hp", "x"):
            assert relative_error(ours[name], theirs[name]) < tolerance, name
    assert relative_error(ours["out"], exact["out"]) > 0.01  # something is rounded


def test_small_columns_of_a_weight_have_a_scale_of_their_own():
    """rowwise_with_gw_hp: for the gradient of the input torchao rounds the whole weight with one scale; small columns become zeros."""
    ours, theirs, exact = (one["x"][..., :8] for one in run("rowwise_with_gw_hp", torch.float32, features=(-8, 0)))
    assert relative_error(ours, exact) < 0.05
    assert relative_error(theirs, exact) > 0.9
