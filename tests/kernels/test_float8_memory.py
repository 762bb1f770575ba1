"""Bytes of 8-bit copies by `plan_memory`, next to those that the operators have at once; Triton's interpreter runs the kernels."""

import pytest

from eagle_kernels import DecoderShape, Training, plan_memory
from eagle_kernels.memory.float8 import mlp_backward
from tests.support.interpreter import interpret

SIZES = [(256, 32, 96), (64, 128, 256), (16, 128, 128)]


def check_mlp():
    """A product on tensor cores has no memory but its result's; the interpreter's product of other dtypes is replaced by that."""
    import torch

    from eagle_kernels import float8_mlp, use_implementation
    from eagle_kernels.ops.float8 import function
    from tests.support.live import LiveBytes

    def product(a, b, rows, dtype, *, fast):
        return torch.zeros(rows, b.values.shape[0], dtype=dtype)

    function.product = product
    for tokens, hidden, inner in SIZES:
        for recompute in (False, True):
            shapes = ((tokens, hidden), (inner, hidden), (inner, hidden), (hidden, inner))
            x, *weights = (torch.randn(shape).bfloat16().requires_grad_() for shape in shapes)
            with use_implementation("triton"):
                out = float8_mlp(x, *weights, recompute=recompute)
                dout = torch.ones_like(out)
                with LiveBytes() as live:
                    gradients = torch.autograd.grad(out, (x, *weights), dout)
            planned = mlp_backward(tokens, hidden, inner, 2, 6 * hidden * inner, rebuilt=recompute) + 2 * tokens * hidden
            assert len(gradients) == 4
            assert 0.93 * planned < live.peak < 1.07 * planned, (tokens, hidden, inner, recompute, live.peak, planned)


def test_backward_of_the_mlp():
    interpret("from tests.kernels.test_float8_memory import check_mlp; check_mlp()")


SHAPE = {"hidden": 3584, "intermediate": 18944, "layers": 28, "heads": 28, "kv_heads": 4, "head_dim": 128, "vocab": 152064}


@pytest.mark.parametrize("tokens", [2048, 32768])
def test_copies_are_in_the_layers_that_make_them(tokens):
    plain, eight = (plan_memory(DecoderShape(**SHAPE, training=Training(float8=float8)), tokens) for float8 in (False, True))
    for name, parts in plain.moments.items():
        more = eight.moments[name].get("live", 0) - parts.get("live", 0)
        assert sum(eight.moments[name].values()) - sum(parts.values()) == more
        assert more == 0 or name.startswith("backward of layer")
        if name.endswith("attention"):
            assert more >= tokens * (3584 + 3584)
