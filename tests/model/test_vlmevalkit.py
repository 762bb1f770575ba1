"""The class for VLMEvalKit: its messages give the answers of `generate`. VLMEvalKit itself is not needed."""

import pytest
import torch

from eagle_model.integrations.vlmevalkit import Eagle, register
from tests.support.media import random_image, random_pixels, write_video
from tests.support.models import save_tiny_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def media(tmp_path_factory):
    path = tmp_path_factory.mktemp("media")
    random_image(1, (90, 40)).save(path / "a.png")
    write_video(path / "c.mp4", [random_pixels(seed, (64, 48)) for seed in range(20)], fps=10)
    return {"image": str(path / "a.png"), "video": str(path / "c.mp4")}


@pytest.mark.parametrize("kind", ["image", "video"])
def test_answers_are_those_of_generate(folder, media, kind):
    eagle = Eagle(str(folder), device="cpu", max_new_tokens=6)
    message = [{"type": kind, "value": media[kind]}, {"type": "text", "value": "What is it?"}]
    content = [{"type": kind, kind: media[kind]}, {"type": "text", "text": "What is it?"}]
    processor, model = eagle.answerer.processor, eagle.answerer.model
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=True, return_tensors="pt"
    )
    with torch.inference_mode():
        output = model.generate(**inputs, max_new_tokens=6, do_sample=False)
    expected = processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
    assert eagle.generate(message, dataset="MMBench") == expected
    assert Eagle.VIDEO_LLM
    assert Eagle.INTERLEAVE


def test_turns_and_settings(folder, media):
    eagle = Eagle(str(folder), device="cpu", max_new_tokens=6, max_tiles=1)
    question = [{"type": "image", "value": media["image"]}, {"type": "text", "value": "What?"}]
    first = eagle.generate(question)
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": first}, {"role": "user", "content": "Why?"}]
    assert isinstance(eagle.chat_inner(turns), str)
    assert first != Eagle(str(folder), device="cpu", max_new_tokens=6).generate(question)
    with pytest.raises(ValueError, match="audio"):
        eagle.generate([{"type": "audio", "value": "a.wav"}])


def test_registration(folder):
    table = {}
    register(table, "Eagle2.5", str(folder), device="cpu", max_new_tokens=2)
    assert isinstance(table["Eagle2.5"]().generate("Hello"), str)
    with pytest.raises(ValueError, match="already"):
        register(table, "Eagle2.5", str(folder))
