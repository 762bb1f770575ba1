"""Recompute: random chains of pieces and kept operations have the gradients of plain autograd, and keep what they say and no more."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from eagle_kernels import Recompute
from eagle_kernels.recompute import call
from tests.support.live import LiveBytes

WIDTH = 8


def heads(x, weight):
    """A projection whose result is a view of other strides."""
    return (x @ weight).unflatten(-1, (2, WIDTH // 2)).transpose(0, 1)


def joined(x, weight):
    return x.transpose(0, 1).flatten(1) * weight.sum()


#: Functions of a state [T, WIDTH] and a weight [WIDTH, WIDTH]; some give two results, of which one is used, or a view of their argument.
FUNCTIONS = {
    "project": lambda x, w: x @ w,
    "norm": lambda x, w: F.layer_norm(x, (WIDTH,), w[0]),
    "activate": lambda x, _: F.silu(x) * x,
    "halves": lambda x, w: (torch.tanh(x @ w), x.exp())[0],
    "turned": lambda x, w: joined(heads(x, w), w),
    "viewed": lambda x, _: x.view(-1).view(x.shape),
    "twice": lambda x, w: x + x.sigmoid() @ w,
}
chains = st.lists(st.tuples(st.sampled_from(sorted(FUNCTIONS)), st.booleans()), min_size=1, max_size=7)


def run(chain, weights, x, again):
    """again: the context, or `call`. Every second state is added to the sum, so that results have several readers."""
    total, state = x, x
    for (name, piece), weight in zip(chain, weights):
        state = (again if piece else call)(FUNCTIONS[name], state, weight)
        total = total + state * total.detach().cos()
    return total


def gradients(chain, again=None):
    generator = torch.Generator().manual_seed(len(chain))
    x = torch.randn(5, WIDTH, dtype=torch.float64, generator=generator, requires_grad=True)
    weights = [torch.randn(WIDTH, WIDTH, dtype=torch.float64, generator=generator) / 3 for _ in chain]
    for weight in weights:
        weight.requires_grad_()
    state = x * 0.5
    if again is None:
        out = run(chain, weights, state, call)
    else:
        with again:
            out = run(chain, weights, state, again)
    out.square().mean().backward()
    return [x.grad, *(weight.grad for weight in weights)]


@settings(max_examples=150, deadline=None)
@given(chains)
def test_gradients_are_those_of_autograd_to_the_bit(chain):
    for got, expected in zip(gradients(chain, Recompute()), gradients(chain)):
        assert (got is None) == (expected is None)
        assert got is None or torch.equal(got, expected)


def test_pieces_run_again_once_and_kept_operations_do_not():
    calls = []

    def counted(name):
        def function(x, w):
            calls.append(name)
            return FUNCTIONS["project"](x, w)

        return function

    x, w = torch.randn(3, WIDTH, requires_grad=True), torch.eye(WIDTH, requires_grad=True)
    with Recompute() as again:
        first = again(counted("first"), x, w)
        kept = counted("kept")(first, w) + counted("kept")(first, w)
        last = again(counted("last"), kept, w) * 2
    assert calls == ["first", "kept", "kept", "last"]
    calls.clear()
    last.square().sum().backward()
    assert calls == ["first"]  # what is read of `last` are its arguments


def test_a_result_that_nothing_reads_is_not_computed_again():
    calls = []

    def constant(x):
        calls.append(1)
        return x + 1

    x = torch.randn(3, requires_grad=True)
    with Recompute() as again:
        out = again(constant, x) + 2
    out.sum().backward()
    assert calls == [1]


def test_memory_is_that_of_what_is_kept():
    size = 4 * 100 * WIDTH  # of a state
    x, w = torch.randn(100, WIDTH, requires_grad=True), torch.randn(WIDTH, WIDTH, requires_grad=True)

    def chain(again, project):
        normed = again(F.layer_norm, x, (WIDTH,))
        inner = again(F.silu, project(torch.matmul, normed, w))
        return (inner @ w).sum()

    used = {}
    for name in ("autograd", "kept", "all"):
        with LiveBytes() as live:
            if name == "autograd":
                loss = chain(call, call)
            else:
                with Recompute() as again:
                    loss = chain(again, call if name == "kept" else again)
            used[name] = live.now - 4  # the loss
        loss.backward()
        del loss
    assert used["all"] == 0  # x is the caller's
    assert used["kept"] == size  # the projection; autograd: the norm's output and statistics, the projection and its activation
    assert used["autograd"] >= 3 * size


def test_everything_is_freed_after_backward():
    x, w = torch.randn(100, WIDTH), torch.randn(WIDTH, WIDTH, requires_grad=True)
    with LiveBytes() as live:
        with Recompute() as again:
            out = again(F.silu, again(torch.matmul, x, w) @ w)
        out.sum().backward()
        del out, again
        w.grad = None
        assert live.now == 0


def test_a_graph_that_is_kept_runs_backward_twice():
    x = torch.randn(4, WIDTH, requires_grad=True)
    with Recompute() as again:
        out = again(torch.exp, again(torch.tanh, x)).sum()
    (first,) = torch.autograd.grad(out, x, retain_graph=True)
    (second,) = torch.autograd.grad(out, x)
    assert torch.equal(first, second)


def test_autocast_of_forward_is_that_of_recomputation():
    x, w = torch.randn(4, WIDTH, requires_grad=True), torch.randn(WIDTH, WIDTH, requires_grad=True)
    dtypes = []

    def project(a, b):
        out = a @ b
        dtypes.append(out.dtype)
        return out.exp()

    found = []
    for again in (Recompute(), None):
        x.grad = w.grad = None
        with torch.autocast("cpu", torch.bfloat16):
            if again is None:
                loss = project(x, w).square().sum()
            else:
                with again:
                    loss = again(project, x, w).square().sum()
        loss.backward()
        found.append((x.grad, w.grad))
    assert dtypes == [torch.bfloat16] * 3
    assert all(torch.equal(a, b) for a, b in zip(*found))


def test_without_gradients_nothing_is_stored():
    with torch.no_grad(), Recompute() as again:
        assert torch.equal(again(torch.exp, torch.zeros(3)), torch.ones(3))


def test_an_error_inside_leaves_autograd_as_it_was():
    x = torch.randn(4, requires_grad=True)
    with pytest.raises(ValueError, match="inside"), Recompute() as again:
        again(lambda _: (_ for _ in ()).throw(ValueError("inside")), x)
    x.exp().sum().backward()
    assert torch.equal(x.grad, x.exp().detach())


def test_a_kept_tensor_that_is_modified_is_an_error():
    x = torch.randn(4, requires_grad=True)
    with Recompute() as again:
        state = x * 1
        out = again(torch.exp, state).sum()
    with torch.no_grad():
        state.add_(1)
    with pytest.raises(RuntimeError, match=r"shape \(4,\) .* modified in place"):
        out.backward()


def test_a_piece_that_does_something_else_is_an_error():
    x, calls = torch.randn(4, requires_grad=True), []

    def changing(value):
        calls.append(1)
        return value.exp() if len(calls) == 1 else value.exp().tanh()

    with Recompute() as again:
        out = again(changing, x).sum()
    with pytest.raises(RuntimeError, match="changing saved 1 tensors in forward and 2"):
        out.backward()


def nested(x, weights, group):
    """Layers with a kept product each, alone or inside one piece."""

    def layers(state):
        for weight in weights:
            with Recompute() as again:
                state = state + again(F.silu, again(F.layer_norm, state, (WIDTH,)) @ weight)
        return state

    if not group:
        return layers(x)
    with Recompute() as again:
        return torch.cat([again(layers, part) for part in x.split(group)])


@pytest.mark.parametrize("group", [2, 5, 9])
def test_inside_a_piece_nothing_is_kept_until_it_runs_again(group):
    weights = [torch.randn(WIDTH, WIDTH, requires_grad=True) for _ in range(3)]
    x = torch.randn(9, WIDTH, requires_grad=True)
    found = []
    for size in (0, group):
        with LiveBytes() as live:
            loss = nested(x, weights, size).square().mean()
            kept = live.now
            loss.backward()
        found.append((kept, [x.grad, *(weight.grad for weight in weights)]))
        x.grad = None
        for weight in weights:
            weight.grad = None
    state = 9 * WIDTH * 4
    assert found[1][0] - found[0][0] <= state - 3 * 2 * state  # of each layer its input (x is the caller's) and product; the joined result
    for one, other in zip(found[0][1], found[1][1]):
        torch.testing.assert_close(one, other)
