"""rms_norm and add_rms_norm against float64, on shapes at the limits of the kernels, and their invalid arguments."""

import pytest
import torch

from eagle_kernels import add_rms_norm, reference, rms_norm

SMALL = [(1, 8), (7, 131), (100, 16), (3, 257)]
LARGE = [(1, 3584), (4099, 1152), (517, 3584), (33, 4304), (17, 18944), (100003, 128), (65, 4097)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def sizes(device: str) -> list[tuple[int, int]]:
    return SMALL if device == "cpu" else SMALL + LARGE


def dtypes(device: str) -> list[torch.dtype]:
    return [torch.float32, torch.float16] if device == "cpu" else DTYPES  # the interpreter truncates casts to bf16


@pytest.mark.usefixtures("poisoned_memory")
def test_rms_norm_is_as_exact_as_torch(device, assert_as_exact_as_torch):
    for dtype in dtypes(device):
        for rows, cols in sizes(device):
            inputs = {"x": torch.randn(rows, cols, device=device) * 3, "weight": torch.randn(cols, device=device) + 1}
            assert_as_exact_as_torch(rms_norm, inputs, ("x", "weight"), dtype)


@pytest.mark.usefixtures("poisoned_memory")
def test_add_rms_norm_is_as_exact_as_torch(device, assert_as_exact_as_torch):
    for dtype in dtypes(device):
        for rows, cols in sizes(device)[1:]:
            inputs = {name: torch.randn(rows, cols, device=device) for name in ("residual", "x")}
            inputs["weight"] = torch.randn(cols, device=device)
            assert_as_exact_as_torch(add_rms_norm, inputs, ("residual", "x", "weight"), dtype)


def test_strided_rows_and_leading_dimensions(device, assert_as_exact_as_torch):
    wide = torch.randn(2, 5, 64, device=device)
    inputs = {"x": wide[..., 16:48], "weight": torch.randn(32, device=device)}
    assert_as_exact_as_torch(rms_norm, inputs, ("x", "weight"), torch.float32)
    inputs = {"x": torch.randn(32, 10, device=device).t(), "weight": torch.randn(32, device=device)}
    assert_as_exact_as_torch(rms_norm, inputs, ("x", "weight"), torch.float32)


def test_float32_weight_with_low_precision_input(device, relative_error):
    x = torch.randn(9, 33, device=device).half()
    weight = torch.randn(33, device=device).requires_grad_()
    out = rms_norm(x, weight)
    assert out.dtype == torch.float16
    out.sum().backward()
    assert weight.grad is not None
    assert weight.grad.dtype == torch.float32
    assert relative_error(out, reference.rms_norm(x.double(), weight.double())) < 1e-3


def test_no_rows(device):
    x = torch.randn(0, 16, device=device, requires_grad=True)
    weight = torch.ones(16, device=device, requires_grad=True)
    rms_norm(x, weight).sum().backward()
    assert weight.grad is not None
    assert weight.grad.eq(0).all()


def test_gradient_in_the_parameters_grad_dtype(device):
    weight = torch.ones(64, device=device, dtype=torch.float16).requires_grad_()
    weight.grad_dtype = torch.float32
    x = torch.randn(1000, 64, device=device, dtype=torch.float16)
    rms_norm(x, weight).backward(torch.randn(1000, 64, device=device).half())
    assert weight.grad is not None
    assert weight.grad.dtype == torch.float32
    assert not torch.equal(weight.grad, weight.grad.half().float()), "the gradient went through float16"


def test_reference_gradients_are_right():
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(rms_norm, (x, weight))
    assert torch.autograd.gradcheck(add_rms_norm, (x, x.detach().clone().requires_grad_(), weight))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"weight": torch.ones(7)}, ValueError, "weight has shape"),
        ({"weight": torch.ones(8, dtype=torch.float16)}, TypeError, "weight is torch.float16"),
        ({"x": torch.ones(4, 8, dtype=torch.int64)}, TypeError, "x is torch.int64"),
        ({"weight": torch.ones(8, device="meta")}, ValueError, "weight is on meta"),
    ],
)
def test_bad_input(change, error, message):
    with pytest.raises(error, match=message):
        rms_norm(**({"x": torch.ones(4, 8), "weight": torch.ones(8)} | change))


@pytest.mark.parametrize("residual", [torch.float32, torch.bfloat16])
def test_under_autocast_x_follows_the_residual(residual):
    """Under autocast a projection returns bfloat16 for every dtype of the residual."""
    r, weight = torch.randn(4, 8).to(residual), torch.ones(8)
    x = torch.randn(4, 8, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        projected = x @ torch.eye(8)
        assert projected.dtype == torch.bfloat16
        found = add_rms_norm(r, projected, weight)
        found[0].sum().backward()
    expected = add_rms_norm(r, projected.detach().to(residual), weight)
    assert all(torch.equal(a, b) and a.dtype == residual for a, b in zip(found, expected))
    assert x.grad is not None
    with pytest.raises(TypeError, match=r"residual is torch\.float32"):
        add_rms_norm(r.float(), projected, weight)


def test_residual_of_another_shape():
    with pytest.raises(ValueError, match="residual has shape"):
        add_rms_norm(torch.ones(4, 8), torch.ones(5, 8), torch.ones(8))


@pytest.mark.parametrize("eps", [-1.0, float("nan"), float("inf")])
def test_an_eps_that_gives_no_number_is_refused(eps):
    x = torch.ones(2, 4)
    with pytest.raises(ValueError, match="rms_norm: eps is"):
        rms_norm(x, torch.ones(4), eps)
    with pytest.raises(ValueError, match="add_rms_norm: eps is"):
        add_rms_norm(x, x, torch.ones(4), eps)
