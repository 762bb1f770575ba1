"""linear_cross_entropy against float64: ignored rows, weights, smoothing, leading dimensions, stored memory, invalid arguments."""

import functools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import eagle_kernels.ops.linear_cross_entropy.function as function_module
import eagle_kernels.ops.linear_cross_entropy.reference as reference_module
from eagle_kernels import linear_cross_entropy, reference, use_implementation
from eagle_kernels.ops.linear_cross_entropy.function import CHUNK_BYTES, ROW_MULTIPLE, chunk_rows, kept_rows

BOTH = ("hidden", "weight")


def example(device: str, tokens: int, hidden: int, vocab: int, labelled: float = 0.7, sharpness: float = 1.0) -> dict:
    labels = torch.randint(0, vocab, (tokens,), device=device)
    labels[torch.rand(tokens, device=device) >= labelled] = -100
    return {
        "hidden": torch.randn(tokens, hidden, device=device),
        "weight": torch.randn(vocab, hidden, device=device) * sharpness / hidden**0.5,
        "labels": labels,
    }


def options(device: str, tokens: int) -> list[dict]:
    weights = torch.rand(tokens, device=device)
    weights[::5] = 0
    return [
        {},
        {"denominator": torch.tensor(40.0, device=device)},
        {"token_weights": weights, "denominator": torch.tensor(3.5, device=device)},
        {"label_smoothing": 0.1, "z_loss": 1e-3, "token_weights": weights},
    ]


def dtypes(device: str) -> list[torch.dtype]:
    return [torch.float32, torch.float16] + ([torch.bfloat16] if device == "cuda" else [])


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of a few rows, so that small examples have several."""
    monkeypatch.setattr(function_module, "chunk_rows", lambda kept, vocab, itemsize: min(kept, 16))


@pytest.mark.usefixtures("poisoned_memory", "small_chunks")
def test_is_as_exact_as_torch(device, assert_as_exact_as_torch):
    for dtype in dtypes(device):
        for tokens, hidden, vocab in [(21 if device == "cpu" else 37, 33, 50), (1, 8, 3)]:
            for option in options(device, tokens):
                inputs = example(device, tokens, hidden, vocab, labelled=1.0 if tokens == 1 else 0.7)
                if tokens == 1:
                    option = {key: value for key, value in option.items() if key != "token_weights"}
                assert_as_exact_as_torch(functools.partial(linear_cross_entropy, **option), inputs, BOTH, dtype)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("sharpness", [1.0, 30.0], ids=["random", "confident"])
def test_hard_inputs_are_as_exact_as_torch(device, sharpness, assert_as_exact_as_torch):
    tokens, hidden, vocab = (33, 16, 70) if device == "cpu" else (2049, 1152, 151_999)
    inputs = example(device, tokens, hidden, vocab, sharpness=sharpness)
    if sharpness > 1:
        # p -> 1 at the label, and confidently wrong in the last rows.
        inputs["hidden"] = F.normalize(inputs["weight"][inputs["labels"].clamp(min=0)]) * hidden**0.5
        inputs["labels"][-3:] = 0
    for dtype in dtypes(device):
        assert_as_exact_as_torch(linear_cross_entropy, inputs, BOTH, dtype)


@pytest.mark.gpu
def test_many_rows_and_full_vocabulary(assert_as_exact_as_torch):
    for tokens, hidden, vocab in [(100_003, 64, 517), (9000, 512, 152_064)]:
        inputs = example("cuda", tokens, hidden, vocab)
        assert_as_exact_as_torch(linear_cross_entropy, inputs, BOTH, torch.bfloat16)


def test_one_labelled_row(device, assert_as_exact_as_torch):
    inputs = example(device, 21, 16, 40, labelled=0.0)
    inputs["labels"][13] = 7
    assert_as_exact_as_torch(linear_cross_entropy, inputs, BOTH, torch.float32)


@pytest.mark.parametrize("num_kept", [None, 0])
def test_nothing_labelled_is_zero_with_zero_gradients(device, num_kept):
    inputs = example(device, 21, 16, 40, labelled=0.0)
    for name in BOTH:
        inputs[name].requires_grad_()
    with use_implementation("triton"):
        for denominator in (None, torch.tensor(5.0, device=device), torch.tensor(1e-40, device=device)):
            loss = linear_cross_entropy(**inputs, denominator=denominator, num_kept=num_kept)
            assert loss.item() == 0
            loss.backward()
    assert all(inputs[name].grad.eq(0).all() for name in BOTH)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("choice", ["triton", "torch"])
def test_known_count_gives_the_same_and_a_wrong_one_is_nan(device, choice):
    inputs = example(device, 25, 8, 30)
    kept = int((inputs["labels"] >= 0).sum())
    for name in BOTH:
        inputs[name].requires_grad_()
    with use_implementation(choice):
        expected = linear_cross_entropy(**inputs)
        assert torch.equal(linear_cross_entropy(**inputs, num_kept=kept), expected)
        for wrong in (0, kept - 1, kept + 1):
            for denominator in (None, torch.tensor(5.0, device=device)):
                loss = linear_cross_entropy(**inputs, num_kept=wrong, denominator=denominator)
                assert loss.isnan()
                # The gradient is NaN too: a caller that does not check the loss cannot take a step with it.
                assert torch.autograd.grad(loss, inputs["weight"])[0].isnan().all()
        with pytest.raises(ValueError, match=f"num_kept is {kept + 1}, but {kept}"):
            linear_cross_entropy(**inputs, num_kept=kept + 1, validate=True)


def test_details(device, relative_error):
    inputs = example(device, 40, 8, 30)
    with use_implementation("triton"):
        loss, losses, count = linear_cross_entropy(**inputs, return_details=True)
    _, expected, kept = reference.linear_cross_entropy(inputs["hidden"].double(), inputs["weight"].double(), inputs["labels"])
    assert count.item() == kept.item() == (inputs["labels"] >= 0).sum()
    assert relative_error(losses, expected) < 1e-6
    assert losses[inputs["labels"] < 0].eq(0).all()
    assert torch.isclose(loss, losses.sum() / count)


@pytest.mark.usefixtures("small_chunks")
def test_backward_twice_and_scaled(device):
    inputs = example(device, 40, 8, 30)
    leaves = [inputs[name].requires_grad_() for name in BOTH]
    with use_implementation("triton"):
        loss = linear_cross_entropy(**inputs)
        first = [g.clone() for g in torch.autograd.grad(loss * 2, leaves, retain_graph=True)]
        second = [g.clone() for g in torch.autograd.grad(loss, leaves, retain_graph=True)]
        third = torch.autograd.grad(loss * 2, leaves)
    assert all(torch.equal(a, 2 * b) for a, b in zip(first, second))
    assert all(torch.equal(a, b) for a, b in zip(first, third))


@pytest.mark.usefixtures("small_chunks")
def test_float32_weight_gradient(device, relative_error):
    inputs = example(device, 70, 8, 30)
    half = {name: value.half() if name in BOTH else value for name, value in inputs.items()}
    exact = [half[name].double().requires_grad_() for name in BOTH]
    linear_cross_entropy(*exact, inputs["labels"]).backward()
    parameter = half["weight"].requires_grad_()
    parameter.grad_dtype = torch.float32
    master = half["weight"].detach().float().requires_grad_()
    with use_implementation("triton"):
        linear_cross_entropy(**half).backward()
        linear_cross_entropy(half["hidden"], master, half["labels"]).backward()
    for gradient in (parameter.grad, master.grad):
        assert gradient.dtype == torch.float32
        assert not torch.equal(gradient, gradient.half().float())
        assert relative_error(gradient, exact[1].grad) < 1e-3
    assert torch.equal(parameter.grad, master.grad)


@pytest.mark.gpu
def test_a_denominator_does_not_reduce_accuracy(relative_error):
    """1/3 in bf16 has an error of 0.001. Gradients made from entries that are divided by 3 before the matmul would have it too."""
    inputs = example("cuda", 512, 64, 5000, labelled=1.0, sharpness=0.5)
    low = [inputs[name].bfloat16().requires_grad_() for name in BOTH]
    low[1].grad_dtype = torch.float32
    exact = [x.detach().double().requires_grad_() for x in low]
    for tensors in (low, exact):
        linear_cross_entropy(*tensors, inputs["labels"], denominator=torch.tensor(3.0, device="cuda")).backward()
    assert relative_error(low[1].grad, exact[1].grad) < 3e-4


def test_float16_survives_a_large_denominator(device, relative_error):
    """A gradient of 1e-8 is 0 in float16. Multiplied by the loss scale it is not, if nothing was rounded before."""
    inputs = example(device, 20, 8, 30)
    denominator = torch.tensor(1e6, device=device)
    exact = [inputs[name].half().double().requires_grad_() for name in BOTH]
    (linear_cross_entropy(*exact, inputs["labels"], denominator=denominator) * 65536).backward()
    low = [inputs[name].half().requires_grad_() for name in BOTH]
    with use_implementation("triton"):
        (linear_cross_entropy(*low, inputs["labels"], denominator=denominator) * 65536).backward()
    assert all(relative_error(a.grad, b.grad) < 5e-3 for a, b in zip(low, exact))


def test_frozen_head_or_frozen_hidden(device):
    with use_implementation("triton"):
        for name, other in (BOTH, BOTH[::-1]):
            inputs = example(device, 20, 8, 30)
            inputs[name].requires_grad_()
            linear_cross_entropy(**inputs).backward()
            assert inputs[name].grad is not None
            assert inputs[other].grad is None
        with torch.no_grad():
            assert linear_cross_entropy(**example(device, 20, 8, 30)).isfinite()


def test_tied_head(device, relative_error):
    """One parameter as embedding and as head receives both gradients."""
    weight = torch.randn(30, 8, device=device)
    ids = torch.randint(0, 30, (20,), device=device)
    tied = [weight.clone().requires_grad_(), weight.double().requires_grad_()]
    for parameter, choice in zip(tied, ("triton", "torch")):
        with use_implementation(choice):
            linear_cross_entropy(F.embedding(ids, parameter), parameter, ids).backward()
    assert relative_error(tied[0].grad, tied[1].grad) < 1e-6


def test_strided_inputs(device, assert_as_exact_as_torch):
    inputs = example(device, 20, 16, 30)
    inputs["hidden"] = torch.randn(20, 32, device=device)[:, ::2]
    inputs["weight"] = torch.randn(16, 30, device=device).t()
    assert_as_exact_as_torch(linear_cross_entropy, inputs, BOTH, torch.float32)


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}, {"denominator": 7.0}])
@pytest.mark.parametrize("weighted", [False, True])
def test_leading_dimensions_equal_flat_rows(device, options, weighted):
    inputs = example(device, 24, 8, 30)
    if weighted:
        inputs["token_weights"] = torch.rand(24, device=device)
    results = []
    with use_implementation("triton"):
        for leading in ((24,), (2, 12), (3, 2, 4), (1, 24)):
            leaves = [inputs[name].clone().requires_grad_() for name in BOTH]
            shaped = {name: inputs[name].view(leading) for name in inputs if name not in BOTH}
            out = linear_cross_entropy(leaves[0].view(*leading, 8), leaves[1], **shaped, **options, return_details=True)
            assert out.token_losses.shape == leading
            out.loss.backward()
            results.append([out.loss.detach(), out.token_losses.flatten(), out.count, *(leaf.grad for leaf in leaves)])
    for result in results[1:]:
        assert all(torch.equal(found, expected) for found, expected in zip(result, results[0]))


def test_a_shifted_batch_needs_no_flattening(device, relative_error):
    """hidden[:, :-1] of a batch has no view as rows."""
    hidden, weight = torch.randn(2, 9, 8, device=device), torch.randn(30, 8, device=device)
    ids = torch.randint(0, 30, (2, 9), device=device)
    leaves = [x.clone().requires_grad_() for x in (hidden, weight)]
    with use_implementation("triton"):
        linear_cross_entropy(leaves[0][:, :-1], leaves[1], ids[:, 1:]).backward()
    exact = [x.double().requires_grad_() for x in (hidden, weight)]
    F.cross_entropy((exact[0][:, :-1] @ exact[1].t()).flatten(0, 1), ids[:, 1:].flatten()).backward()
    assert all(relative_error(leaf.grad, wide.grad) < 1e-6 for leaf, wide in zip(leaves, exact))


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 60), st.floats(0, 1), st.integers(0, 2**31), st.booleans())
def test_kept_rows_without_a_wait_are_nonzero(tokens, fraction, seed, weighted):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.where(torch.rand(tokens, generator=generator) < fraction, 5, -100)
    weights = (torch.rand(tokens, generator=generator) < 0.5).float() if weighted else None
    rows, count, number = kept_rows(labels, weights, -100, -1)
    expected = torch.arange(tokens) if rows is None else rows
    again, other, _ = kept_rows(labels, weights, -100, number)
    assert count == other == number
    assert torch.equal(torch.arange(tokens) if again is None else again, expected)


def test_reference_in_chunks_equals_the_whole(monkeypatch):
    inputs = example("cpu", 40, 8, 30)
    expected = linear_cross_entropy(**inputs, label_smoothing=0.1)
    monkeypatch.setattr(reference_module, "CHUNK_ELEMENTS", 30 * 7)
    assert torch.allclose(linear_cross_entropy(**inputs, label_smoothing=0.1), expected)


def test_reference_gradients_and_definition():
    inputs = example("cpu", 9, 4, 6)
    weights = torch.rand(9, dtype=torch.float64) + 0.1
    call = functools.partial(linear_cross_entropy, labels=inputs["labels"], token_weights=weights, denominator=torch.tensor(2.0))
    hidden, weight = (inputs[name].double().requires_grad_() for name in BOTH)
    assert torch.autograd.gradcheck(lambda h, w: call(h, w, label_smoothing=0.2, z_loss=0.1), (hidden, weight))
    keep = inputs["labels"] >= 0
    losses = F.cross_entropy(hidden @ weight.t(), inputs["labels"], reduction="none")
    assert torch.isclose(call(hidden, weight), (losses * weights)[keep].sum() / 2)


@pytest.mark.parametrize("denominator", [0.0, torch.tensor(0.0), -1.0, float("nan")])
def test_denominator_must_be_positive(denominator):
    with pytest.raises(ValueError, match="denominator is"):
        linear_cross_entropy(**example("cpu", 5, 4, 6), denominator=denominator)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"labels": torch.tensor([0, 1, 2, 6])}, ValueError, "1 labels are outside the weight's 6 rows, the first is 6"),
        ({"labels": torch.tensor([0, 1, 2, -5])}, ValueError, "the first is -5"),
        ({"labels": torch.zeros(4)}, TypeError, "labels is torch.float32"),
        ({"labels": torch.zeros(3, dtype=torch.int64)}, ValueError, "labels has shape"),
        ({"hidden": torch.ones(8)}, ValueError, r"hidden has shape \(8,\), expected \[\.\.\., H\]"),
        ({"hidden": torch.ones(2, 2, 8)}, ValueError, r"labels has shape \(4,\), expected \(2, 2\)"),
        ({"hidden": torch.ones(2, 2, 8), "labels": torch.zeros(2, 2).long(), "num_kept": 5}, ValueError, "num_kept is 5, expected 0 to 4"),
        ({"weight": torch.ones(6, 7)}, ValueError, "weight has shape"),
        ({"weight": torch.ones(6, 8).half()}, TypeError, "weight is torch.float16"),
        ({"token_weights": torch.ones(5)}, ValueError, "token_weights has shape"),
        ({"token_weights": torch.ones(4).half()}, TypeError, "token_weights is torch.float16"),
        ({"token_weights": torch.ones(4).requires_grad_()}, ValueError, "requires a gradient"),
        ({"denominator": torch.ones(2)}, ValueError, "denominator has shape"),
        ({"label_smoothing": 1.0}, ValueError, "label_smoothing is 1.0"),
        ({"z_loss": -1.0}, ValueError, "z_loss is -1.0"),
        ({"num_kept": 5}, ValueError, "num_kept is 5"),
    ],
)
def test_bad_input(change, error, message):
    inputs = {"hidden": torch.ones(4, 8), "weight": torch.ones(6, 8), "labels": torch.tensor([0, 1, 2, 3])}
    with pytest.raises(error, match=message):
        linear_cross_entropy(**(inputs | change))


@pytest.mark.gpu
def test_labels_out_of_range_on_the_gpu_are_nan_or_an_error():
    inputs = example("cuda", 20, 8, 30, labelled=1.0)
    inputs["labels"][3] = 30
    assert linear_cross_entropy(**inputs).isnan()
    with pytest.raises(ValueError, match="outside the weight's 30 rows"):
        linear_cross_entropy(**inputs, validate=True)


@pytest.mark.gpu
def test_never_waits_for_the_device_with_a_known_count():
    inputs = example("cuda", 4096, 64, 1000)
    kept = int((inputs["labels"] >= 0).sum())
    for name in BOTH:
        inputs[name] = inputs[name].bfloat16().requires_grad_()
    denominator = torch.tensor(float(kept), device="cuda")
    linear_cross_entropy(**inputs, denominator=denominator, num_kept=kept).backward()  # compiles
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        linear_cross_entropy(**inputs, denominator=denominator, num_kept=kept).backward()
    finally:
        torch.cuda.set_sync_debug_mode(mode)


@given(kept=st.integers(0, 10**7), vocab=st.integers(1, 10**6), itemsize=st.sampled_from([2, 4]))
def test_chunks_are_few_and_nearly_equal(kept, vocab, itemsize):
    rows = chunk_rows(kept, vocab, itemsize)
    if kept == 0:
        assert rows == 0
        return
    most = max(1, CHUNK_BYTES // (vocab * itemsize))
    unit = min(ROW_MULTIPLE, rows)
    chunks = -(-kept // rows)
    assert 1 <= rows <= most
    assert rows == kept or most < ROW_MULTIPLE or rows % ROW_MULTIPLE == 0
    assert (chunks - 1) * (most // unit * unit) < kept, "fewer chunks would do"
    assert chunks * (rows - unit) < kept, "smaller chunks would do"


@pytest.mark.gpu
def test_stores_one_chunk_of_logits():
    tokens, hidden, vocab = 16384, 256, 152_064
    inputs = example("cuda", tokens, hidden, vocab, labelled=1.0)
    for name in BOTH:
        inputs[name] = inputs[name].bfloat16().requires_grad_()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    linear_cross_entropy(**inputs, num_kept=tokens).backward()
    extra = torch.cuda.max_memory_allocated() - before - vocab * hidden * 4
    assert extra <= 1.3 * 2**30
    assert chunk_rows(tokens, vocab, 2) * vocab * 2 <= extra, "the bound would hold for any implementation"


@pytest.mark.parametrize("z_loss", [float("nan"), float("inf"), -1.0])
def test_z_loss_is_finite(z_loss):
    with pytest.raises(ValueError, match=r"z_loss is .*, expected 0 or more"):
        linear_cross_entropy(torch.randn(6, 32), torch.randn(50, 32), torch.arange(6), z_loss=z_loss)
