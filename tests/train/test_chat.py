"""A conversation: every turn answers as it would without kept keys and values, and computes only what is new."""

import pytest
import torch

from eagle_model import EagleProcessor
from eagle_train.evaluation.generate import generate
from eagle_train.runs.chat import Chat
from tests.support.media import random_image, random_pixels, write_video
from tests.support.models import small_tokenizer, tiny_model


@pytest.fixture(scope="module")
def model():
    return tiny_model(tokenizer=small_tokenizer(320))


@pytest.fixture(scope="module")
def processor(model):
    return EagleProcessor.for_config(small_tokenizer(320), model.config, min_frames=2, max_tokens=2000)


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    return str(write_video(tmp_path_factory.mktemp("v") / "v.mp4", [random_pixels(seed, (64, 48)) for seed in range(20)], fps=10))


def afresh(chat, question, placed="", images=(), videos=()):
    """The answer to the next question from the whole prompt."""
    messages = [*chat.messages, {"role": "user", "content": placed + question}]
    made = chat.processor.process(messages, [*chat.images, *images], [*chat.videos, *videos], add_generation_prompt=True, **chat.settings)
    device = torch.device("cpu")
    return generate(chat.model, chat.processor.tokenizer, [made.input_ids], made.tiles, max_new_tokens=8, device=device)[0]


def counted(model, calls):
    """Count the tokens and tiles of every forward."""

    def hook(module, arguments, kwargs):
        tiles = kwargs.get("pixel_values")
        calls.append((kwargs["input_ids"].shape[1], 0 if tiles is None else len(tiles)))

    return model.register_forward_pre_hook(hook, with_kwargs=True)


def test_turns_equal_the_whole_prompt(model, processor, video):
    chat = Chat(model, processor, images=[random_image(1, (90, 40))], max_new_tokens=8)
    assert afresh(chat, "What is it?", "<image-1>") == chat.answer("What is it?")
    assert afresh(chat, "And the colour?") == chat.answer("And the colour?")
    more = [random_image(2)], [video]
    assert afresh(chat, "Like these?", "<image-2><video-1>", *more) == chat.answer("Like these?", *more)
    assert afresh(chat, "Why?") == chat.answer("Why?")
    assert [message["role"] for message in chat.messages] == ["user", "assistant"] * 4


def test_a_turn_computes_what_is_new(model, processor, video):
    calls = []
    chat = Chat(model, processor, videos=[video], max_new_tokens=4)
    with counted(model, calls):
        chat.answer("What happens?")
        first = calls[0]
        calls.clear()
        chat.answer("And then?")
    whole = len(processor.process(chat.messages[:3], (), chat.videos, add_generation_prompt=True).input_ids)
    assert first[1] == len(processor.process(chat.messages[:1], (), chat.videos).tiles)
    assert calls[0][1] == 0
    assert calls[0][0] < whole - first[0] + 8


@pytest.mark.parametrize("change", ["tiles", "budget"])
def test_another_plan_is_computed_anew(model, processor, change):
    """The same ids with other pixels, and other ids: neither uses what belongs to another plan."""
    chat = Chat(model, processor, images=[random_image(3, (120, 30))], max_new_tokens=8)
    chat.answer("a")
    if change == "tiles":
        chat.images[0] = random_image(4, (120, 30))
    else:
        chat.settings["max_tiles"] = 1
    assert afresh(chat, "b") == chat.answer("b")


def test_pieces_are_the_answer_and_can_be_stopped(model, processor):
    chat, other = (Chat(model, processor, max_new_tokens=24) for _ in range(2))
    whole = other.answer("a")
    pieces = chat.stream("a")
    begun = next(pieces)
    while not begun.strip():
        begun += next(pieces)
    pieces.close()
    assert whole.startswith(chat.messages[-1]["content"])
    assert chat.messages[-1]["content"] == begun.strip()
    assert afresh(chat, "b") == Chat.answer(_shortened(chat), "b")


def _shortened(chat):
    chat.max_new_tokens = 8
    return chat


def test_an_error_leaves_the_conversation(model, processor):
    chat = Chat(model, processor, max_new_tokens=4)
    chat.answer("a")
    before = list(chat.messages)
    with pytest.raises(ValueError, match="no image"):
        chat.answer("<image-1>?")
    with pytest.raises(ValueError, match="fit"):
        chat.answer("a " * 3000)
    assert chat.messages == before
    assert afresh(chat, "b")[:1] == chat.answer("b")[:1]


def test_sampling_draws(model, processor):
    torch.manual_seed(0)
    assert len({Chat(model, processor, temperature=5.0, max_new_tokens=8).answer("a") for _ in range(4)}) > 1
