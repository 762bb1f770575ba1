"""Linear layers and the MLP with products of 8-bit floats: rounding, output and gradients, memory, and invalid arguments."""

import functools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from eagle_kernels import Recompute, float8_hardware, float8_linear, float8_linears, float8_mlp, reference, swiglu_mlp, use_implementation
from eagle_kernels.ops.float8.reference import LARGEST, columns, product, rounded, rows, scales_of
from tests.support.live import saved_shapes

E4M3 = torch.float8_e4m3fn
RECIPES = (False, True)  # exact_weight_gradient


def like_e4m3(*shape: int, dim: int, dtype: torch.dtype, device: str = "cpu") -> torch.Tensor:
    """Values that rounding with a scale for each row (dim 1) or column (dim 0) leaves as they are."""
    scale = 2.0 ** torch.randint(-5, 5, (shape[0], 1) if dim == 1 else (1, shape[1]))
    return (torch.randn(shape).to(E4M3).float() * scale).to(device, dtype)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


@given(st.floats(min_value=2**-30, max_value=2**60, width=32))
def test_a_scale_is_the_least_power_of_two_that_fits(largest):
    scale = scales_of(torch.tensor([largest])).item()
    assert largest / scale <= LARGEST < largest / (scale / 2)
    assert torch.frexp(torch.tensor(scale)).mantissa == 0.5


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 20), st.integers(1, 40), st.integers(0, 2**30))
def test_rounding_errs_by_at_most_a_sixteenth_of_each_value(height, width, seed):
    x = torch.randn(height, width, generator=torch.Generator().manual_seed(seed))
    for dim in (0, 1):
        values = rounded(x, dim)
        least = x.abs().amax(dim, keepdim=True) / LARGEST * 2**-9  # half of the least e4m3 value, with the largest possible scale
        assert bool(((values - x).abs() <= x.abs() / 16 + least).all())
        assert torch.equal(rounded(values, dim), values)


def test_values_that_are_not_finite_stay_visible():
    for bad in (float("inf"), float("-inf"), float("nan")):
        x = torch.randn(16, 32)
        x[3, 5] = bad
        out = float8_linear(x, torch.randn(16, 32))
        assert out[3].isnan().all()
        assert out[:3].isfinite().all()


def test_rows_of_zeros():
    x = torch.zeros(3, 32)
    assert torch.equal(float8_linear(x, torch.randn(16, 32)), torch.zeros(3, 16))
    values, scales = rows(x, 16)
    assert values.float().abs().sum() == 0
    assert scales.isfinite().all()


@pytest.mark.usefixtures("poisoned_memory")
def test_kernels_write_the_values_and_scales_of_the_reference(device):
    from eagle_kernels.ops.float8.kernel import launch_columns, launch_rows

    sizes = [(1, 16), (5, 40), (33, 70), (3, 2100), (130, 65)] + ([(4099, 3584), (513, 18944)] if device == "cuda" else [])
    for dtype in (torch.float32, torch.bfloat16):
        for height, width in sizes:
            padded = -(-height // 16) * 16
            for launch, plain, dim in ((launch_rows, rows, 1), (launch_columns, columns, 0)):
                # Triton's interpreter forgets to carry when a mantissa is rounded up, so it gets values that stay as they are.
                x = like_e4m3(height, width, dim=dim, dtype=dtype, device=device)
                if device == "cuda":
                    x = x + torch.randn_like(x)
                values, scales = launch(x, padded)
                expected, expected_scales = plain(x, padded)
                assert torch.equal(scales, expected_scales)
                assert same(values, expected)
    x = like_e4m3(64, 20, dim=1, dtype=torch.float32, device=device)
    assert same(launch_columns(x.t(), 32)[0], columns(x.t(), 32)[0])  # not contiguous


def test_swiglu_kernel_rounds_the_activation(device):
    from eagle_kernels.ops.float8.kernel import launch_swiglu_rows

    gate, up = torch.randn(5, 2064, device=device).bfloat16() * 3, torch.randn(5, 2064, device=device).bfloat16()
    values, scales = launch_swiglu_rows(gate, up, 16)
    expected, expected_scales = rows(reference.swiglu(gate, up), 16)
    assert torch.equal(scales, expected_scales)
    # exp differs by a rounding step between the two, which moves few values to a neighbour; the interpreter lacks the carry (see above).
    different = (values.float() != expected.float()).float().mean()
    assert different < (0.002 if device == "cuda" else 0.05)
    assert values[5:].float().abs().sum() == 0


@pytest.mark.parametrize("rebuild", [False, True])
@pytest.mark.usefixtures("poisoned_memory")
def test_swiglu_backward_kernel_rounds_what_the_plain_one_writes(device, rebuild):
    from eagle_kernels.ops.float8.rounding import by_rows, swiglu_backward_by_rows

    dout, gate, up = (torch.randn(5, 2064, device=device).bfloat16() for _ in range(3))
    with use_implementation("triton"):
        dgate, dup, inner = torch.ops.eagle_kernels.swiglu_backward(dout, gate, up, rebuild)
        found = swiglu_backward_by_rows(dout.clone(), gate, up, rebuild)
        expected = by_rows(found.dgate), by_rows(found.dup)
    # Two kernels may contract products and sums differently, which is at most a rounding step.
    for one, other in ((found.dgate, dgate), (found.dup, dup), (found.out, inner)):
        torch.testing.assert_close(one, other, rtol=2**-7, atol=1e-5)
    for one, other in zip((found.dgate_rounded, found.dup_rounded), expected):
        assert same(one.values, other.values)
        assert torch.equal(one.scales, other.scales)


def layer(height: int, narrow: int, wide: int, dtype: torch.dtype, device: str = "cpu") -> list[torch.Tensor]:
    """x [height, narrow], weight [wide, narrow], bias [wide], gradient [height, wide]; a few rows are far larger than the others."""
    x = torch.randn(height, narrow, device=device) * torch.where(torch.arange(height, device=device) % 7 == 0, 30.0, 1.0)[:, None]
    sizes = (wide, narrow), (wide,), (height, wide)
    weight, bias, dout = (torch.randn(size, device=device) for size in sizes)
    return [x.to(dtype), (weight / narrow**0.5).to(dtype), bias.to(dtype), dout.to(dtype)]


def run(function, inputs, dout) -> list[torch.Tensor]:
    inputs = [one.detach().clone().requires_grad_() for one in inputs]
    out = function(*inputs)
    out.backward(dout)
    return [out.detach(), *(one.grad for one in inputs)]


@pytest.mark.parametrize("exact", RECIPES)
@pytest.mark.parametrize("height", [1, 16, 37])
def test_output_and_gradients_are_those_of_rounded_values(height, exact, relative_error):
    x, weight, bias, dout = layer(height, 48, 32, torch.float64)
    found = run(functools.partial(float8_linear, exact_weight_gradient=exact), [x, weight, bias], dout)
    expected = run(functools.partial(reference.float8_linear, exact_weight_gradient=exact), [x, weight, bias], dout)
    for one, other in zip(found, expected):
        assert relative_error(one, other) < 1e-12
    plain = run(F.linear, [x, weight, bias], dout)
    errors = [relative_error(one, other) for one, other in zip(found, plain)]
    # Rounding e4m3 values errs by 1/32 on average at most; both factors are rounded.
    assert all(0.005 < error < 0.06 for error in errors[:2])
    assert errors[2] < 1e-12 if exact else 0.005 < errors[2] < 0.06
    assert errors[3] < 1e-12


def test_several_weights_give_the_results_of_each_alone():
    x, first, _, dout = layer(21, 48, 32, torch.float32)
    second, bias = torch.randn(16, 48), torch.randn(16)
    outs = float8_linears(x, [first, second], [None, bias])
    assert torch.equal(outs[0], float8_linear(x, first))
    assert torch.equal(outs[1], float8_linear(x, second, bias))
    x.requires_grad_()
    second.requires_grad_()
    outs = float8_linears(x, [first, second])
    torch.autograd.backward(outs, [dout, dout[:, :16].contiguous()])
    alone = x.detach().requires_grad_()
    sum_of = (float8_linear(alone, first) * dout).sum() + (float8_linear(alone, second) * dout[:, :16]).sum()
    sum_of.backward()
    assert torch.allclose(x.grad, alone.grad, rtol=1e-5, atol=1e-5)
    assert first.grad is None
    assert second.grad is not None


def test_shapes_and_dtypes():
    x = torch.randn(2, 3, 32, dtype=torch.bfloat16)
    weight = torch.randn(16, 32, dtype=torch.bfloat16, requires_grad=True)
    out = float8_linear(x, weight)
    assert (out.shape, out.dtype) == ((2, 3, 16), torch.bfloat16)
    out.sum().backward()
    assert weight.grad.dtype == torch.bfloat16
    assert float8_linear(x[:0], weight).shape == (0, 3, 16)
    with torch.autocast("cpu", torch.bfloat16):
        assert float8_linear(x.float(), weight.float()).dtype == torch.bfloat16
    assert not float8_hardware("cpu")


def test_gradient_of_no_rows_is_zero():
    weight = torch.randn(16, 32, requires_grad=True)
    for exact in RECIPES:
        (gradient,) = torch.autograd.grad(float8_linear(torch.randn(0, 32), weight, exact_weight_gradient=exact).sum(), weight)
        assert torch.equal(gradient, torch.zeros(16, 32))


def mlp_inputs(height: int, hidden: int, inner: int, dtype: torch.dtype, device: str = "cpu") -> list[torch.Tensor]:
    x = torch.randn(height, hidden, device=device)
    weights = [torch.randn(size, device=device) / size[1] ** 0.5 for size in ((inner, hidden), (inner, hidden), (hidden, inner))]
    return [one.to(dtype) for one in (x, *weights)]


@pytest.mark.parametrize("exact", RECIPES)
def test_mlp_is_its_three_layers(exact, relative_error):
    x, *weights = mlp_inputs(19, 32, 48, torch.float64)
    dout = torch.randn(19, 32, dtype=torch.float64)
    functions = [functools.partial(function, exact_weight_gradient=exact) for function in (float8_mlp, reference.float8_mlp)]
    found, expected = (run(function, [x, *weights], dout) for function in functions)
    for one, other in zip(found, expected):
        assert relative_error(one, other) < 1e-12


@pytest.mark.parametrize("exact", RECIPES)
def test_fused_mlp_differs_from_its_layers_by_rounding(device, exact, relative_error):
    """Compares errors against the MLP without rounding, which the interpreter's lacking carry triples."""
    size = (37, 32, 48) if device == "cpu" else (1003, 1152, 4304)
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    x, *weights = mlp_inputs(*size, dtype, device)
    dout = torch.randn(size[0], size[1], device=device).to(dtype)
    with use_implementation("triton"):
        found = run(functools.partial(float8_mlp, exact_weight_gradient=exact), [x, *weights], dout)
    wide = [one.double() for one in (x, *weights)]
    with use_implementation("torch"):
        emulated = run(functools.partial(float8_mlp, exact_weight_gradient=exact), wide, dout.double())
        plain = run(swiglu_mlp, wide, dout.double())
    for one, other, expected in zip(found, emulated, plain):
        assert relative_error(one, expected) < (4 if device == "cpu" else 1.1) * relative_error(other, expected) + 4e-3


def test_mlp_that_recomputes_has_the_same_gradients_and_keeps_neither_gate_nor_up(device):
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    inputs = [one.requires_grad_() for one in mlp_inputs(9, 32, 48, dtype, device)]
    found = []
    for recompute in (False, True):
        with use_implementation("triton"), saved_shapes() as shapes:
            out = float8_mlp(*inputs, recompute=recompute)
        found.append((out, torch.autograd.grad(out.square().sum(), inputs), shapes.count((9, 48))))
    assert torch.equal(found[0][0], found[1][0])
    assert all(torch.equal(a, b) for a, b in zip(found[0][1], found[1][1]))
    assert [count for *_, count in found] == [2, 0]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_activation_checkpointing_gives_the_same_bits(device):
    x, weight, bias, dout = (one.bfloat16() for one in layer(37, 48, 32, torch.float32, device))
    first = run(lambda x, w, b: float8_linear(x * 2, w, b), [x, weight, bias], dout)
    second = run(lambda x, w, b: checkpoint(lambda x: float8_linear(x * 2, w, b), x, use_reentrant=False), [x, weight, bias], dout)

    def in_pieces(x, w, b):
        with Recompute() as again:
            return again(float8_linear, again(torch.mul, x, 2), w, b)

    third = run(in_pieces, [x, weight, bias], dout)
    for one, other, last in zip(first, second, third):
        assert torch.equal(one, other)
        assert torch.equal(one, last)


@pytest.mark.parametrize(
    ("x", "weight", "error", "message"),
    [
        (torch.ones(3, 24), torch.ones(16, 24), ValueError, r"weight has shape \(16, 24\).*multiples of 16"),
        (torch.ones(3, 32), torch.ones(20, 32), ValueError, "multiples of 16"),
        (torch.ones(3, 48), torch.ones(16, 32), ValueError, "K from x"),
        (torch.ones(3, 32).half(), torch.ones(16, 32), TypeError, "weight is torch.float32"),
    ],
)
def test_bad_input(x, weight, error, message):
    with pytest.raises(error, match=message):
        float8_linear(x, weight)


@pytest.mark.parametrize(
    ("position", "weight", "message"),
    [(1, torch.ones(20, 32), "w_gate has shape"), (2, torch.ones(48, 16), "w_up has shape"), (3, torch.ones(32, 64), "w_down has shape")],
)
def test_bad_mlp(position, weight, message):
    inputs = [torch.ones(3, 32), torch.ones(48, 32), torch.ones(48, 32), torch.ones(32, 48)]
    inputs[position] = weight
    if position == 1:
        inputs[2], inputs[3] = torch.ones(20, 32), torch.ones(32, 20)
    with pytest.raises(ValueError, match=message):
        float8_mlp(*inputs)


@pytest.fixture
def fp8_gpu() -> None:
    if not float8_hardware("cuda"):
        pytest.skip("this GPU has no products of 8-bit floats")


@pytest.mark.gpu
@pytest.mark.usefixtures("fp8_gpu")
@pytest.mark.parametrize("exact", RECIPES)
@pytest.mark.parametrize(("height", "narrow", "wide"), [(1, 64, 32), (4099, 3584, 4608), (1003, 18944, 3584)])
def test_gpu_agrees_with_the_reference_in_float64(height, narrow, wide, exact, relative_error):
    """Rounded values are the same; what differs is the order of sums, fewer bits in partial sums, and the result's bfloat16."""
    x, weight, bias, dout = layer(height, narrow, wide, torch.bfloat16, "cuda")
    found = run(functools.partial(float8_linear, exact_weight_gradient=exact), [x, weight, bias], dout)
    wide_inputs = [one.double() for one in (x, weight, bias)]
    emulated = run(functools.partial(reference.float8_linear, exact_weight_gradient=exact), wide_inputs, dout.double())
    plain = run(F.linear, wide_inputs, dout.double())
    for name, one, other, expected in zip(("output", "dx", "dweight", "dbias"), found, emulated, plain):
        assert one.dtype == torch.bfloat16
        # Partial sums of outputs and input gradients have fewer bits than float32.
        assert relative_error(one, other) < (2e-2 if name in ("output", "dx") else 8e-3), name
        assert relative_error(one, expected) < 0.06, name


@pytest.mark.gpu
@pytest.mark.usefixtures("fp8_gpu")
def test_gpu_product_of_padded_rows(relative_error):
    """Products take any number of rows: packs have arbitrary numbers of tokens."""
    from eagle_kernels.ops.float8.rounding import by_columns, by_rows
    from eagle_kernels.ops.float8.rounding import product as on_gpu

    for height in (1, 15, 16, 17, 4095):
        x, weight, _, dout = layer(height, 64, 48, torch.bfloat16, "cuda")
        out = on_gpu(by_rows(x), by_rows(weight), height, torch.bfloat16, fast=True)
        assert out.shape == (height, 48)
        assert relative_error(out, product(*by_rows(x), *by_rows(weight), torch.float64)[:height]) < 4e-3
        pair = by_columns(dout), by_columns(x)
        assert relative_error(on_gpu(*pair, 48, torch.bfloat16, fast=False), product(*pair[0], *pair[1], torch.float64)) < 4e-3


@pytest.mark.parametrize("shape", [(1,), (15,), (6, 16), ()])
def test_a_bias_has_one_value_for_each_row_of_the_weight(shape):
    with pytest.raises(ValueError, match=r"float8_linear: bias has shape .*, expected \(16,\)"):
        float8_linear(torch.randn(6, 32), torch.randn(16, 32), torch.zeros(shape))


@pytest.mark.parametrize("biases", [[], [None], [None] * 3])
def test_every_weight_has_a_bias_or_none(biases):
    with pytest.raises(ValueError, match=f"{len(biases)} biases for 2 weights"):
        float8_linears(torch.randn(6, 32), [torch.randn(16, 32), torch.randn(32, 32)], biases)
