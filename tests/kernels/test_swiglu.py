"""swiglu and swiglu_mlp against float64, all rows at once and in blocks, under activation checkpointing, and their invalid arguments."""

import functools

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from eagle_kernels import swiglu, swiglu_mlp, use_implementation
from tests.support.live import saved_shapes

WEIGHTS = ("w_gate", "w_up", "w_down")


def mlp_inputs(device: str, rows: int, hidden: int, inner: int) -> dict:
    return {
        "x": torch.randn(rows, hidden, device=device),
        "w_gate": torch.randn(inner, hidden, device=device) / hidden**0.5,
        "w_up": torch.randn(inner, hidden, device=device) / hidden**0.5,
        "w_down": torch.randn(hidden, inner, device=device) / inner**0.5,
    }


def precise(device: str) -> list[torch.dtype]:
    return [torch.float32, torch.float16] + ([torch.bfloat16] if device == "cuda" else [])


@pytest.mark.usefixtures("poisoned_memory")
def test_swiglu_is_as_exact_as_torch(device, assert_as_exact_as_torch):
    sizes = [(1, 1), (37, 33), (5, 3000)] + ([(1003, 18944), (100003, 37)] if device == "cuda" else [])
    for dtype in precise(device):
        for size in sizes:
            inputs = {"gate": torch.randn(size, device=device) * 4, "up": torch.randn(size, device=device)}
            assert_as_exact_as_torch(swiglu, inputs, ("gate", "up"), dtype)


def test_halves_of_a_fused_projection(device, assert_as_exact_as_torch):
    gate, up = torch.randn(7, 64, device=device).chunk(2, dim=-1)
    assert_as_exact_as_torch(swiglu, {"gate": gate, "up": up}, ("gate", "up"), torch.float32)


@pytest.mark.parametrize("rows", [None, 5, 16, 1000])
@pytest.mark.usefixtures("poisoned_memory")
def test_mlp_is_as_exact_as_torch(device, rows, assert_as_exact_as_torch):
    sizes = [(16, 24, 40)] if device == "cpu" else [(16, 24, 40), (3001, 1152, 4304)]
    for dtype in precise(device):
        for size in sizes:
            inputs = mlp_inputs(device, *size)
            assert_as_exact_as_torch(functools.partial(swiglu_mlp, rows=rows), inputs, tuple(inputs), dtype)


def test_mlp_does_not_modify_its_inputs_and_can_run_backward_twice(device):
    with use_implementation("triton"):
        inputs = {name: value.requires_grad_() for name, value in mlp_inputs(device, 9, 8, 12).items()}
        before = {name: value.detach().clone() for name, value in inputs.items()}
        out = swiglu_mlp(**inputs, rows=4)
        first = torch.autograd.grad(out.sum(), list(inputs.values()), retain_graph=True)
        second = torch.autograd.grad(out.sum(), list(inputs.values()))
    assert all(torch.equal(a, b) for a, b in zip(first, second))
    assert all(torch.equal(before[name], value) for name, value in inputs.items())


def test_mlp_that_recomputes_has_the_same_gradients_and_keeps_neither_gate_nor_up(device):
    inputs = {name: value.requires_grad_() for name, value in mlp_inputs(device, 9, 8, 12).items()}
    found = []
    for recompute in (False, True):
        with use_implementation("triton"), saved_shapes() as shapes:
            out = swiglu_mlp(**inputs, recompute=recompute)
        found.append((out, torch.autograd.grad(out.square().sum(), list(inputs.values())), shapes.count((9, 12))))
    assert torch.equal(found[0][0], found[1][0])
    assert all(torch.equal(a, b) for a, b in zip(found[0][1], found[1][1]))
    assert [count for *_, count in found] == [2, 0]


def test_mlp_under_checkpoint_with_frozen_weights(device):
    with use_implementation("triton"):
        inputs = mlp_inputs(device, 9, 8, 12)
        x = inputs["x"].requires_grad_()
        inputs["w_up"].requires_grad_()
        arguments = (x, *(inputs[name] for name in WEIGHTS))
        checkpoint(functools.partial(swiglu_mlp, rows=4), *arguments, use_reentrant=False).square().sum().backward()
        through = (x.grad.clone(), inputs["w_up"].grad.clone())
        x.grad = inputs["w_up"].grad = None
        swiglu_mlp(*arguments, rows=4).square().sum().backward()
    assert torch.equal(through[0], x.grad)
    assert torch.equal(through[1], inputs["w_up"].grad)
    assert inputs["w_gate"].grad is None


def test_blocks_add_up_in_float32(device, relative_error):
    """A parameter with a float32 gradient receives the sum of all blocks without any rounding to half precision."""
    inputs = {name: value.half() for name, value in mlp_inputs(device, 64, 8, 8).items()}
    wide = {name: value.double().requires_grad_() for name, value in inputs.items()}
    swiglu_mlp(**wide).sum().backward()
    for name in WEIGHTS:
        inputs[name].requires_grad_()
        inputs[name].grad_dtype = torch.float32
    with use_implementation("triton"):
        swiglu_mlp(**inputs, rows=2).sum().backward()
    for name in WEIGHTS:
        assert inputs[name].grad.dtype == torch.float32
        assert relative_error(inputs[name].grad, wide[name].grad) < 1e-3


@pytest.mark.gpu
def test_mlp_memory_does_not_grow_with_the_sequence():
    extra = []
    for tokens in (4096, 16384):
        inputs = {name: value.bfloat16().requires_grad_() for name, value in mlp_inputs("cuda", tokens, 1024, 4096).items()}
        for value in inputs.values():
            value.grad = torch.zeros_like(value)
        out = swiglu_mlp(**inputs, rows=1024)
        dout = torch.randn_like(out)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        out.backward(dout)
        extra.append(torch.cuda.max_memory_allocated() - before - inputs["x"].nbytes)
    assert extra[1] <= extra[0] * 1.02


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"w_up": torch.ones(11, 8)}, ValueError, "w_up has shape"),
        ({"w_down": torch.ones(12, 8)}, ValueError, "w_down has shape"),
        ({"w_gate": torch.ones(12, 8).half()}, TypeError, "w_gate is torch.float16"),
        ({"rows": 0}, ValueError, "rows is 0"),
    ],
)
def test_bad_input(change, error, message):
    with pytest.raises(error, match=message):
        swiglu_mlp(**(mlp_inputs("cpu", 3, 8, 12) | change))


@pytest.mark.parametrize("rows", [1.5, float("nan"), "4"])
def test_rows_are_whole_numbers(rows):
    with pytest.raises(ValueError, match=r"swiglu_mlp: rows is .*, expected a positive whole number"):
        swiglu_mlp(torch.randn(6, 32), torch.randn(16, 32), torch.randn(16, 32), torch.randn(32, 16), rows=rows)
