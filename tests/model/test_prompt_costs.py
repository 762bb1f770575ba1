"""Costs: exact where they can be, and never too small, for any tokenizer."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from eagle_model.prompt import VideoSpan, encode, render
from eagle_model.prompt.costs import PromptCosts


@pytest.fixture(scope="module")
def merging_tokenizer():
    """Merges digits with what stands around them, so that no cost follows from the number of digits."""
    from eagle_model.tokenizer import add_eagle_tokens

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    texts = [f"Frame {n} sample at {n / 2:.2f}s: The first video sampled with {n / 10:.2f} fps: " for n in range(0, 300, 7)]
    trainer = trainers.BpeTrainer(vocab_size=500, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    backend.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    add_eagle_tokens(tokenizer)
    return tokenizer


@pytest.fixture(scope="module")
def costs(qwen_tokenizer, small_tokenizer, merging_tokenizer):
    result = {name: PromptCosts(t) for name, t in (("qwen", qwen_tokenizer), ("small", small_tokenizer), ("merging", merging_tokenizer))}
    assert [c.digits_alike for c in result.values()] == [True, True, False]
    return result


CONTENT = st.text(alphabet="ab 1é<>\n.:", max_size=12)
TIMES = st.lists(st.floats(0, 99999), min_size=1, max_size=14).map(sorted)


@given(before=CONTENT, after=CONTENT, times=TIMES, fps=st.floats(0, 999.99), known=st.sampled_from(["both", "times", "none"]))
@settings(deadline=None, max_examples=60)
@pytest.mark.parametrize("name", ["qwen", "small", "merging"])
def test_never_too_small(costs, name, before, after, times, fps, known):
    cost = costs[name]
    k = 3
    messages = [{"role": "user", "content": before + "<video-1>" + after}, {"role": "assistant", "content": after}]
    span = VideoSpan(times if known != "none" else None, fps if known == "both" else None, k, len(times))
    encoded = encode(render(messages, images=[5], videos=[span]), cost.encoder)
    fixed = cost.fixed_tokens(messages, 1, 1, timed=[known != "none"])
    exact = fixed.text_tokens + 5 + cost.frames_tokens(span.times, k, frames=len(times))
    assert len(encoded.input_ids) <= exact
    if cost.digits_alike:
        # The bound takes a rate with three digits before the point; without a rate the header is shorter by all of "sampled with".
        assert exact <= len(encoded.input_ids) + ({1: 2, 2: 1}.get(len(f"{fps:.2f}") - 3, 0) if known == "both" else 30)
    assert cost.frames_tokens(span.times, k, frames=len(times)) <= len(times) * cost.frame_tokens(
        len(times), max(times) if known != "none" else None, k
    )
    assert fixed.label_tokens == (encoded.labels >= 0).sum()


@given(content=CONTENT, images=st.integers(0, 3))
@settings(deadline=None, max_examples=40)
def test_exact_without_videos(costs, content, images):
    for cost in costs.values():
        messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "yes"}]
        encoded = encode(render(messages, images=[7] * images), cost.encoder)
        assert cost.fixed_tokens(messages, images).text_tokens + 7 * images == len(encoded.input_ids)


def test_several_videos(costs):
    spans = [VideoSpan([0.0, 1.0], 1.0, 4), VideoSpan(None, None, 4, 3), VideoSpan([5.0] * 12, 120.0, 4)]
    messages = [{"role": "user", "content": "a <video-2> b <video-1><video-3>"}]
    for cost in costs.values():
        total = cost.fixed_tokens(messages, 0, 3, timed=[True, False, True], add_generation_prompt=True).text_tokens
        total += sum(cost.frames_tokens(span.times, 4, frames=span.frames) for span in spans)
        assert total >= len(encode(render(messages, videos=spans, add_generation_prompt=True), cost.encoder).input_ids)


def test_frame_tokens_grow_with_digits(costs):
    cost = costs["qwen"]
    assert cost.frame_tokens(9, 9.99, 256) + 2 == cost.frame_tokens(10, 10.0, 256)
    assert cost.frame_tokens(9, None, 256) < cost.frame_tokens(9, 9.99, 256)
    with pytest.raises(ValueError, match="at least 1"):
        cost.frame_tokens(0, 1.0, 256)
