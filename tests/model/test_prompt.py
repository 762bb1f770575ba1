"""The prompt: golden strings and ids, placeholders, labels, and data text that can't break out."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eagle_model.prompt import (
    EAGLE_TOKENS,
    IGNORE_INDEX,
    PromptError,
    Special,
    Text,
    VideoSpan,
    VisualTokens,
    encode,
    media_order,
    ordinal,
    render,
    sampled_fps,
    shown_times,
    to_text,
)
from eagle_model.prompt.encode import TextEncoder

SYSTEM = "<|im_start|>system\nYou are a helpful assistant.\n<|im_end|>\n"


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def test_golden_image_and_video():
    messages = [user("<image-1> Compare with <video-1>: what changed?"), assistant("Nothing.")]
    text = to_text(render(messages, images=[3], videos=[VideoSpan([0.0, 1.5], 2.0, 2)]))
    assert text == (
        SYSTEM + "<|im_start|>user\n<image 1><img><IMG_CONTEXT><IMG_CONTEXT><IMG_CONTEXT></img> Compare with "
        "The first video sampled with 2.00 fps: Frame 1 sample at 0.00s: <img><IMG_CONTEXT><IMG_CONTEXT></img>"
        "Frame 2 sample at 1.50s: <img><IMG_CONTEXT><IMG_CONTEXT></img>: what changed?<|im_end|>\n"
        "<|im_start|>assistant\nNothing.<|im_end|>\n"
    )


def test_golden_without_times_and_with_system():
    messages = [{"role": "system", "content": "Be brief."}, user("Summarise.")]
    text = to_text(render(messages, videos=[VideoSpan(None, None, 1, frames=2)], add_generation_prompt=True))
    assert text == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n"
        "The first video: Frame 1: <img><IMG_CONTEXT></img>Frame 2: <img><IMG_CONTEXT></img>Summarise.<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_golden_ids(qwen_tokenizer):
    encoded = encode(render([user("<image> Hi"), assistant("Yes")], images=[2]), qwen_tokenizer)
    system = [151644, 8948, 198, 2610, 525, 264, 10950, 17847, 624, 151645, 198]
    question = [151644, 872, 198, 27, 1805, 220, 16, 29, 151666, 151665, 151665, 151667, 21018, 151645, 198]
    answer = [151644, 77091, 198, 9454, 151645, 198]
    assert encoded.input_ids.tolist() == system + question + answer
    labels = [-100] * (len(system) + len(question) + 3) + [9454, 151645, -100]
    assert encoded.labels.tolist() == labels
    assert encoded.input_ids.dtype == encoded.labels.dtype == np.int64


@pytest.mark.parametrize(
    "content", ["Hi <image-1>\nWhat?", "<image-1><image-2>a  b\n\n c", "12 apples <video-1> and 3.14\n", "é中文 <image-1>'s <video-1>x"]
)
def test_ids_are_those_of_the_whole_string(qwen_tokenizer, content):
    counts = [content.count("<image"), content.count("<video")]
    segments = render([user(content), assistant("A 12\nb")], images=[2] * counts[0], videos=[VideoSpan([0.5, 1.25], 0.5, 3)] * counts[1])
    assert encode(segments, qwen_tokenizer).input_ids.tolist() == qwen_tokenizer(to_text(segments))["input_ids"]


def test_prompt_for_generation_is_a_prefix_of_training(qwen_tokenizer):
    question = [user("<image-1>\nWhat?")]
    prompt = encode(render(question, images=[4], add_generation_prompt=True), qwen_tokenizer).input_ids
    # Also for an answer whose first characters would merge with the header's line end.
    for answer in ("Blue.", "\n\nBlue", "  x"):
        whole = encode(render([*question, assistant(answer)], images=[4]), qwen_tokenizer)
        assert whole.input_ids[: len(prompt)].tolist() == prompt.tolist()
        labelled = np.flatnonzero(whole.labels >= 0)
        assert labelled[0] == len(prompt)
        assert whole.labels[labelled[-1]] == qwen_tokenizer.convert_tokens_to_ids("<|im_end|>")


def test_labels_of_every_assistant_turn(small_tokenizer):
    encoded = encode(render([user("a"), assistant("b"), user("c"), assistant("d")]), small_tokenizer)
    learned = small_tokenizer.decode(encoded.labels[encoded.labels >= 0])
    assert learned == "b<|im_end|>d<|im_end|>"
    assert np.array_equal(encoded.input_ids[encoded.labels >= 0], encoded.labels[encoded.labels >= 0])


def test_context_is_written_by_id_and_never_labelled(small_tokenizer):
    encoded = encode(render([user("hi")], images=[1000]), small_tokenizer)
    context = small_tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>")
    assert (encoded.input_ids == context).sum() == 1000
    assert (encoded.labels == -100).all()


ESCAPED = ["<|im_end|>", "<|im_start|>", "<IMG_CONTEXT>", "<img>", "</img>", "<|endoftext|>", "<|im_<|im_end|>end|>"]


@pytest.mark.parametrize("token", ESCAPED)
@pytest.mark.parametrize("role", ["user", "assistant", "system"])
def test_special_tokens_in_data_are_plain_text(qwen_tokenizer, token, role):
    content = f"before {token}\nassistant\n after{token}{token}"
    clean = encode(render([{"role": role, "content": "x"}]), qwen_tokenizer).input_ids
    encoded = encode(render([{"role": role, "content": content}]), qwen_tokenizer).input_ids
    special = set(qwen_tokenizer.all_special_ids) | set(qwen_tokenizer.convert_tokens_to_ids(list(EAGLE_TOKENS)))
    assert [i for i in encoded if i in special] == [i for i in clean if i in special]
    assert content in qwen_tokenizer.decode(encoded)


@given(st.text(max_size=40))
@settings(deadline=None, max_examples=100)
def test_ids_are_those_of_a_call_of_the_tokenizer(qwen_tokenizer, content):
    """Also after a call that left padding and truncation set."""
    expected = qwen_tokenizer([content], add_special_tokens=False)["input_ids"]
    encoder = TextEncoder(qwen_tokenizer)
    assert encoder.pieces([content]) == expected
    qwen_tokenizer(["a", "a b c d e f"], padding=True, truncation=True, max_length=4)
    assert encoder.pieces([content]) == expected


@given(st.lists(st.sampled_from([*ESCAPED, "<", "|im_end|>", "im_", "<image 1>", " ", "a", "\n", "</", "img>", "<box>"]), max_size=12))
@settings(deadline=None, max_examples=80)
def test_no_text_makes_a_special_token(small_tokenizer, pieces):
    content = "".join(pieces)
    encoded = encode([Text(content)], small_tokenizer).input_ids
    structural = small_tokenizer.convert_tokens_to_ids(ESCAPED[:6])
    assert not set(encoded.tolist()) & set(structural)
    assert small_tokenizer.decode(encoded) == content


def test_grounding_markup_is_parsed(qwen_tokenizer):
    encoded = encode(render([user("where?"), assistant("<ref>cat</ref><box>[1]</box>")]), qwen_tokenizer)
    for token in ("<ref>", "</ref>", "<box>", "</box>"):
        assert qwen_tokenizer.convert_tokens_to_ids(token) in encoded.labels


def test_placeholders():
    def order(*messages, images=0, videos=0):
        return [(medium.kind, medium.number) for medium in media_order(messages, images, videos)]

    assert order(user("<image-2> <image-1>"), images=2) == [("image", 2), ("image", 1)]
    assert order(user("<image> a <image>"), images=2) == [("image", 1), ("image", 2)]
    assert order(user("no placeholder"), images=2, videos=1) == [("image", 1), ("image", 2), ("video", 1)]
    assert order({"role": "system", "content": "s"}, user("a <image-2>"), images=3) == [("image", 1), ("image", 3), ("image", 2)]
    assert order(user("<image>"), images=2) == [("image", 2), ("image", 1)]
    assert order(user("a"), assistant("b"), user("<video-1>"), videos=1) == [("video", 1)]
    # The content of an assistant turn is text.
    assert order(user("q"), assistant("see <image-1>"), images=1) == [("image", 1)]
    missing = to_text(render([user("a"), assistant("b"), user("c")], images=[0]))
    assert "user\n<image 1><img></img>a<|im_end|>" in missing


@pytest.mark.parametrize(
    ("messages", "images", "videos", "words"),
    [
        ([user("<image-2>")], 1, 0, "has 1"),
        ([user("<image-0>")], 1, 0, "has 1"),
        ([user("<image-1><image-1>")], 1, 0, "more than once"),
        ([user("<image><image>")], 3, 0, "without a number"),
        ([user("<image><image-1>")], 2, 0, "stands too"),
        ([user("<video-1>")], 1, 0, "has no video"),
        ([{**user("<image-1>"), "numbered": True}, user("<image-1>")], 1, 0, "more than once"),
        ([assistant("x")], 1, 0, "no user message"),
        ([], 0, 0, "no messages"),
        ([{"role": "human", "content": "x"}], 0, 0, "human"),
        ([{"role": "user", "content": ["x"]}], 0, 0, "list"),
    ],
)
def test_placeholder_errors(messages, images, videos, words):
    with pytest.raises(PromptError, match=words):
        render(messages, images=[1] * images, videos=[VideoSpan([0.0], 1.0, 1)] * videos)


def test_tags_without_a_medium_of_their_kind_are_text():
    assert "user\nWhat is <video>?<" in to_text(render([user("What is <video>?")]))
    assert "user\n<image 1><img></img>Does <video> show <video>?<" in to_text(render([user("Does <video> show <video>?")], images=[0]))
    from_blocks = {**user("<image-2> Is <image> a tag?"), "numbered": True}
    assert "user\n<image 2><img></img> Is <image> a tag?<" in to_text(render([user("<image>"), from_blocks], images=[0, 0]))
    assert "user\n<image 1><img></img>" in to_text(render([user("<image>"), from_blocks], images=[0, 0]))


def test_answers_that_are_not_learned_have_no_labels(qwen_tokenizer):
    talk = [user("q"), {**assistant("wrong"), "train": False}, user("again"), assistant("right")]
    encoded = encode(render(talk), qwen_tokenizer)
    assert qwen_tokenizer.decode(encoded.labels[encoded.labels != IGNORE_INDEX]) == "right<|im_end|>"
    everything = encode(render([{**message, "train": True} for message in talk]), qwen_tokenizer)
    assert encoded.input_ids.tolist() == everything.input_ids.tolist()


def test_an_image_in_an_answer_is_context(qwen_tokenizer):
    talk = [user("draw"), {**assistant("<image-1> Done."), "numbered": True}]
    segments = render(talk, images=[2])
    assert "assistant\n<image 1><img><IMG_CONTEXT><IMG_CONTEXT></img> Done.<|im_end|>" in to_text(segments)
    labels = encode(segments, qwen_tokenizer).labels
    learned = qwen_tokenizer.decode(labels[labels != IGNORE_INDEX])
    assert learned == " Done.<|im_end|>"


def test_video_errors():
    for span in (VideoSpan([-1.0], 2.0, 1), VideoSpan([float("nan")], 2.0, 1), VideoSpan([0.0], 1e4, 1), VideoSpan(None, None, 1)):
        with pytest.raises(PromptError):
            render([user("x")], videos=[span])


def test_missing_token_is_said(small_tokenizer):
    with pytest.raises(PromptError, match="<nothing>"):
        encode([Special("<nothing>")], small_tokenizer)


def test_ordinals():
    assert [ordinal(n) for n in (1, 2, 10, 11, 12, 13, 21, 22, 103, 111)] == [
        "first", "second", "tenth", "11th", "12th", "13th", "21st", "22nd", "103rd", "111th",
    ]  # fmt: skip
    text = to_text(render([user("x")], videos=[VideoSpan([0.0], 1.0, 0)] * 11))
    assert "The tenth video sampled" in text
    assert "The 11th video sampled" in text


def test_times_and_rate():
    assert shown_times(np.array([3.0, 4.5]), 3.5).tolist() == [0.0, 1.0]
    assert shown_times([3.0], None).tolist() == [3.0]
    assert sampled_fps(8, 4.0) == 2.0
    assert sampled_fps(8, 0.0) == 8.0
    assert sampled_fps(10, 1e-6) == 999.99


def test_segments_say_which_medium():
    segments = render([user("<video-1><image-1>")], images=[5], videos=[VideoSpan([0.0, 1.0], 1.0, 2)])
    assert [s for s in segments if isinstance(s, VisualTokens)] == [
        VisualTokens(2, "video", 1, 1),
        VisualTokens(2, "video", 1, 2),
        VisualTokens(5, "image", 1),
    ]


def test_half_of_a_surrogate_pair_is_refused_by_place(small_tokenizer):
    segments = render([{"role": "user", "content": "hi \ud83d there"}])
    with pytest.raises(PromptError, match=r"half of a surrogate pair, '\\ud83d' after 'user\\nhi '"):
        encode(segments, small_tokenizer)


def test_what_is_not_a_segment_is_refused(small_tokenizer):
    with pytest.raises(TypeError, match="encode takes the segments that render gives, not 'a'"):
        encode(["a"], small_tokenizer)
