"""gelu_linear against float64, with and without gradients, and its invalid arguments."""

import pytest
import torch

from eagle_kernels import gelu_linear, reference


@pytest.mark.parametrize("approximate", ["tanh", "none"])
def test_values_with_and_without_gradients(approximate, relative_error):
    where = "cuda" if torch.cuda.is_available() else "cpu"
    check(where, torch.float32, approximate, relative_error)


@pytest.mark.gpu
@pytest.mark.parametrize("approximate", ["tanh", "none"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_values_on_the_gpu(approximate, dtype, relative_error):
    check("cuda", dtype, approximate, relative_error)


def check(where, dtype, approximate, relative_error):
    x, weight, bias = (torch.randn(*shape, device=where).to(dtype) for shape in ((3, 40, 64), (72, 64), (72,)))
    exact = reference.gelu_linear(x.double(), weight.double(), bias.double(), approximate)
    plain = reference.gelu_linear(x, weight, bias, approximate)
    allowed = max(2 * relative_error(plain, exact), 1e-6)
    with torch.no_grad():
        assert relative_error(gelu_linear(x, weight, bias, approximate), exact) <= allowed
    out = gelu_linear(x, weight.requires_grad_(), bias, approximate)
    assert relative_error(out, exact) <= allowed
    out.sum().backward()
    assert weight.grad is not None


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"approximate": "erf"}, ValueError, "approximate is 'erf'"),
        ({"weight": torch.ones(5, 7)}, ValueError, r"x is \(3, 8\) and weight \(5, 7\)"),
        ({"bias": torch.ones(4)}, ValueError, "bias has shape"),
        ({"bias": torch.ones(5).half()}, TypeError, "bias is torch.float16"),
    ],
)
def test_bad_input(change, error, message):
    with pytest.raises(error, match=message):
        gelu_linear(**({"x": torch.ones(3, 8), "weight": torch.ones(5, 8), "bias": torch.ones(5)} | change))
