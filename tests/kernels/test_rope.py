"""rope against float64, at positions where float32 angles are wrong, in packs, with leading dimensions, in place; invalid arguments."""

import pytest
import torch

from eagle_kernels import rope, use_implementation


def frequencies(dim: int, device: str = "cpu", base: float = 1_000_000.0) -> torch.Tensor:
    return base ** (-torch.arange(0, dim, 2, device=device, dtype=torch.float32) / dim)


def example(device: str, tokens: int, q_heads: int, k_heads: int, dim: int, far: int) -> dict:
    return {
        "q": torch.randn(tokens, q_heads, dim, device=device),
        "k": torch.randn(tokens, k_heads, dim, device=device),
        "positions": torch.randint(0, far, (tokens,), device=device),
        "inv_freq": frequencies(dim, device),
    }


def cases(device: str) -> list[tuple[int, int, int, int, int]]:
    small = [(37, 3, 1, 16, 100), (5, 2, 2, 6, 5_000_000)]
    return small if device == "cpu" else small + [(1, 28, 4, 128, 10), (4097, 28, 4, 128, 1_048_576), (20001, 16, 16, 72, 4_000_000)]


@pytest.mark.usefixtures("poisoned_memory")
def test_rope_is_as_exact_as_torch(device, assert_as_exact_as_torch):
    for dtype in [torch.float32, torch.float16] + ([torch.bfloat16] if device == "cuda" else []):
        for case in cases(device):
            assert_as_exact_as_torch(rope, example(device, *case), ("q", "k"), dtype)


def test_angles_at_millions_of_tokens(device, relative_error):
    inputs = example(device, 64, 1, 1, 32, 1 << 40)
    inputs["positions"][:8] = torch.tensor([0, 1, 999_999, 1 << 20, (1 << 24) + 1, (1 << 31) + 1, (1 << 33) + 7, 1 << 40], device=device)
    inputs["positions"][32:] = torch.randint(1 << 28, 1 << 29, (32,), device=device)
    with use_implementation("triton"):
        q, _ = rope(**inputs)
    # Angles of exactly these positions and frequencies, in Python's integers and float64.
    angles = torch.tensor(
        [[int(p) * float(f) for f in inputs["inv_freq"].double()] for p in inputs["positions"]], dtype=torch.float64, device=device
    )
    first, second = inputs["q"].double()[:, 0].chunk(2, dim=-1)
    expected = torch.cat((first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()), dim=-1)
    near = inputs["positions"] < (1 << 34)
    assert relative_error(q[near, 0], expected[near]) < 1e-6
    exact = inputs["positions"] < (1 << 29)  # a frequency of 24 bits times a position of 29 bits fits float64
    assert relative_error(q[exact, 0], expected[exact]) < 1e-7
    assert relative_error(q[:, 0], expected) < 2e-4  # at 2^40 a float64 angle has an error of 1e-4 of a turn


def test_heads_of_a_fused_projection(device, assert_as_exact_as_torch):
    fused = torch.randn(33, 6, 16, device=device)
    inputs = {"q": fused[:, :4], "k": fused[:, 4:5], "positions": torch.arange(33, device=device), "inv_freq": frequencies(16, device)}
    assert_as_exact_as_torch(rope, inputs, ("q", "k"), torch.float32)


@pytest.mark.parametrize("strided", [False, True])
def test_leading_dimensions_equal_flat_tokens(device, strided, assert_as_exact_as_torch):
    inputs = example(device, 24, 3, 2, 16, 1000)
    flat = {name: inputs[name].clone().requires_grad_() for name in ("q", "k")}
    shaped = {name: inputs[name].view(2, 12, -1, 16).clone().requires_grad_() for name in ("q", "k")}
    # The layout of transformers, [batch, heads, length, D], seen as [batch, length, heads, D].
    given = {name: x.transpose(1, 2).contiguous().transpose(1, 2) if strided else x for name, x in shaped.items()}
    with use_implementation("triton"):
        expected = rope(**(inputs | flat))
        found = rope(**(inputs | given | {"positions": inputs["positions"].view(2, 12)}))
        sum(out.square().sum() + out[..., 0].sum() for out in expected).backward()
        sum(out.square().sum() + out[..., 0].sum() for out in found).backward()
    for name, out, rows in zip(("q", "k"), found, expected):
        assert out.shape == shaped[name].shape
        assert torch.equal(out.flatten(0, 1), rows)
        assert torch.equal(shaped[name].grad.flatten(0, 1), flat[name].grad)
    whole = inputs | {"positions": inputs["positions"].view(2, 12)} | {name: inputs[name].view(2, 12, -1, 16) for name in ("q", "k")}
    assert_as_exact_as_torch(rope, whole, ("q", "k"), torch.float32)


@pytest.mark.parametrize("choice", ["triton", "torch"])
def test_in_place_with_leading_dimensions(device, choice):
    inputs = example(device, 24, 3, 2, 16, 1000)
    targets = {name: inputs[name].view(2, 12, -1, 16).clone() for name in ("q", "k")}
    with use_implementation(choice):
        expected = rope(**inputs)
        out = rope(**(inputs | targets | {"positions": inputs["positions"].view(2, 12)}), inplace=True)
    for target, result, rows in zip(targets.values(), out, expected):
        assert result.data_ptr() == target.data_ptr()
        assert torch.equal(target.flatten(0, 1), rows)


def test_in_place_is_declared_and_equal(device):
    inputs = example(device, 19, 3, 1, 16, 1000)
    with use_implementation("triton"):
        expected = rope(**inputs)
        leaves = [inputs[name].clone().requires_grad_() for name in ("q", "k")]
        q, k = (leaf * 1.0 for leaf in leaves)
        before = (q.data_ptr(), k.data_ptr())
        out = rope(q, k, inputs["positions"], inputs["inv_freq"], inplace=True)
        assert (out[0].data_ptr(), out[1].data_ptr()) == before
        assert all(torch.equal(a, b) for a, b in zip(out, expected))
        (out[0].sum() + out[1].sum()).backward()
        in_place = [leaf.grad for leaf in leaves]
        leaves = [leaf.detach().requires_grad_() for leaf in leaves]
        out = rope(*leaves, inputs["positions"], inputs["inv_freq"])
        (out[0].sum() + out[1].sum()).backward()
    assert all(torch.equal(a, leaf.grad) for a, leaf in zip(in_place, leaves))


@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("choice", ["triton", "torch"])
def test_in_place_writes_over_its_arguments_on_every_path(device, choice, strided):
    inputs = example(device, 19, 3, 1, 16, 1000)
    places = {name: inputs[name].repeat_interleave(2, -1)[..., ::2] if strided else inputs[name].clone() for name in ("q", "k")}
    leaf = inputs["q"].clone().requires_grad_()
    with use_implementation(choice):
        expected = rope(**inputs)
        out = rope(**(inputs | places), inplace=True)
        assert all(a.data_ptr() == place.data_ptr() for a, place in zip(out, places.values()))
        assert all(torch.equal(place, b) for place, b in zip(places.values(), expected))
        out = rope(leaf * 1.0, inputs["k"].clone(), inputs["positions"], inputs["inv_freq"], inplace=True)[0]
        (found,) = torch.autograd.grad(out.square().sum(), leaf)
    torch.testing.assert_close(found, 2 * inputs["q"])  # a rotation keeps lengths


def test_packed_positions_restart():
    inputs = example("cpu", 12, 2, 1, 8, 10)
    whole = inputs | {"positions": torch.tensor([*range(5), *range(7)])}
    parts = [
        rope(inputs["q"][part], inputs["k"][part], torch.arange(part.stop - part.start), inputs["inv_freq"])
        for part in (slice(0, 5), slice(5, 12))
    ]
    assert torch.equal(rope(**whole)[0], torch.cat([part[0] for part in parts]))


def test_scores_depend_on_distance_only():
    q, k = torch.randn(1, 1, 32, dtype=torch.float64), torch.randn(1, 1, 32, dtype=torch.float64)
    inv_freq = frequencies(32)

    def score(p: int, r: int) -> torch.Tensor:
        return (rope(q, k, torch.tensor([p]), inv_freq)[0] * rope(q, k, torch.tensor([r]), inv_freq)[1]).sum()

    assert torch.allclose(score(17, 5), score(2_000_017, 2_000_005), rtol=1e-6)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"k": torch.ones(3, 1, 8)}, ValueError, "tokens and head dimension"),
        ({"q": torch.ones(2, 2, 2, 8)}, ValueError, "tokens and head dimension"),
        ({"q": torch.ones(4, 8)}, ValueError, r"q has shape \(4, 8\), expected \[\.\.\., heads, D\]"),
        ({"q": torch.ones(2, 2, 2, 8), "k": torch.ones(2, 2, 1, 8)}, ValueError, r"positions has shape \(4,\), expected \(2, 2\)"),
        ({"q": torch.ones(4, 2, 7), "k": torch.ones(4, 1, 7)}, ValueError, "even head dimension"),
        ({"positions": torch.ones(4)}, TypeError, "positions is torch.float32"),
        ({"positions": torch.arange(5)}, ValueError, "positions has shape"),
        ({"inv_freq": torch.ones(4, dtype=torch.bfloat16)}, TypeError, "inv_freq is torch.bfloat16"),
        ({"inv_freq": torch.ones(8)}, ValueError, "inv_freq has shape"),
        ({"k": torch.ones(4, 1, 8).half()}, TypeError, "k is torch.float16"),
    ],
)
def test_bad_input(change, error, message):
    inputs = {"q": torch.ones(4, 2, 8), "k": torch.ones(4, 1, 8), "positions": torch.arange(4), "inv_freq": torch.ones(4)}
    with pytest.raises(error, match=message):
        rope(**(inputs | change))
