"""transformers' pipeline for images and text: a folder or a model, one conversation and batches of unequal ones."""

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, pipeline

from tests.support.media import random_image
from tests.support.models import save_tiny_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"))


def talk(image, question):
    return [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": question}]}]


def said(result):
    return (result[0] if isinstance(result, list) else result)["generated_text"][-1]["content"]


def test_a_folder_and_a_batch(folder, tmp_path):
    """Answers are those of generate, also in a batch whose prompts have different lengths and images different numbers of tiles."""
    random_image(1, (90, 40)).save(tmp_path / "a.png")
    talks = [talk(str(tmp_path / "a.png"), "What is it?"), talk(random_image(2, (30, 30)), "Is there a red circle in the image?")]
    model, processor = AutoModelForImageTextToText.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)
    expected = []
    for messages in talks:
        inputs = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_tensors="pt")
        made = model.generate(**inputs, max_new_tokens=6, do_sample=False)
        expected.append(processor.decode(made[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
    options = {"generate_kwargs": {"max_new_tokens": 6, "do_sample": False}}
    by_name = pipeline("image-text-to-text", model=str(folder), device="cpu")
    assert [said(by_name(messages, **options)) for messages in talks] == expected
    by_model = pipeline("image-text-to-text", model=model, processor=processor)
    assert [said(result) for result in by_model(talks, batch_size=2, **options)] == expected
    assert len(set(expected)) == 2


def test_a_folder_in_bfloat16_on_the_device_that_there_is(folder):
    pytest.importorskip("accelerate")
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype="bfloat16", device_map="auto").eval()
    inputs = AutoProcessor.from_pretrained(folder)(text="<image-1> What?", images=[random_image(1)])
    assert model.dtype == torch.bfloat16
    assert model(**inputs.to(model.device)).logits.isfinite().all()
