"""What generic programs (TRL, vLLM's transformers backend, pipelines) expect of a processor: parts, counts, lists, masks, texts as they
stand."""

import io
import struct

import numpy as np
import pytest
import torch
from PIL import Image

from eagle_model import EagleProcessor, PromptError, encode, render
from eagle_model.prompt import Media, VideoSpan, place_media, render_text, to_text
from eagle_model.visual import BudgetError
from eagle_sampling import MediaError
from tests.support.media import grey_frames, random_image, write_video

TALK = [
    {"role": "user", "content": [{"type": "image", "image": random_image(1, (90, 40))}, {"type": "text", "text": "What is it?"}]},
    {"role": "assistant", "content": "It is blue."},
]


@pytest.fixture(scope="module")
def processor(small_tokenizer):
    return EagleProcessor(small_tokenizer, tile_size=32, tokens_per_tile=4, max_tiles=6)


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    return write_video(tmp_path_factory.mktemp("video") / "grey.mp4", grey_frames(30, 8, (64, 64)), fps=10)


def test_a_text_as_it_stands_is_the_conversation(processor):
    """The string of a conversation, its prompt and its completion give the ids of its messages, whole and in two parts."""
    whole = processor(messages=TALK, return_labels=True)
    image = TALK[0]["content"][0]["image"]
    text = processor.apply_chat_template(TALK)
    again = processor(text=text, images=[image], add_special_tokens=False, return_labels=True)
    for name in ("input_ids", "labels", "pixel_values"):
        assert torch.equal(again[name], whole[name]), name
    prompt = processor.apply_chat_template(TALK[:1], add_generation_prompt=True)
    first = processor(text=prompt, images=image, add_special_tokens=False)["input_ids"]
    rest = processor(text=text.removeprefix(prompt), add_special_tokens=False)["input_ids"]
    assert torch.equal(torch.cat([first, rest], 1), whole["input_ids"])
    begun = processor.apply_chat_template(TALK, continue_final_message=True)
    expected = processor(messages=TALK, continue_final_message=True)["input_ids"]
    assert torch.equal(processor(text=begun, images=[image], add_special_tokens=False)["input_ids"], expected)


def test_text_with_videos(processor, small_tokenizer):
    messages = [{"role": "system", "content": "S"}, {"role": "user", "content": "A <video-1> and <image-1>?"}]
    media = {"images": [8], "videos": [VideoSpan([0.0, 1.25], 2.0, 4)]}
    segments = render(messages, add_generation_prompt=True, **media)
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    assert render_text(text, **media) == segments
    assert to_text(render_text("x<image-1>", images=[1])) == "x<image 1><img><IMG_CONTEXT></img>"
    assert encode(render_text("<|im_end|>"), small_tokenizer).input_ids.tolist() == [small_tokenizer.convert_tokens_to_ids("<|im_end|>")]


def test_text_that_does_not_fit_its_media(processor):
    for text, message in (("no placeholder", "image 1 has no placeholder; write <image-1>"), ("<image-2>", "<image-2> has no image")):
        with pytest.raises(PromptError, match=message):
            processor(text=text, images=[random_image()], add_special_tokens=False)
    assert place_media([{"role": "user", "content": "x"}], 1, 0) == [("user", [Media("image", 1), "x"])]


def test_lists_as_in_transformers(processor):
    """Without return_tensors: unpadded lists of each conversation; return_dict=False: the ids alone; padding fills them up."""
    talks = [TALK, [{"role": "user", "content": "Hi"}]]
    made = processor.apply_chat_template(talks, tokenize=True)
    alone = [processor(messages=talk, add_generation_prompt=False) for talk in talks]
    assert made["input_ids"] == [each["input_ids"][0].tolist() for each in alone]
    assert [len(mask) for mask in made["attention_mask"]] == [len(ids) for ids in made["input_ids"]]
    assert np.array_equal(made["pixel_values"], alone[0]["pixel_values"].numpy())
    assert processor.apply_chat_template(talks, tokenize=True, return_dict=False) == made["input_ids"]
    padded = processor.apply_chat_template(talks, tokenize=True, padding=True, padding_side="right")
    assert len({len(ids) for ids in padded["input_ids"]}) == 1
    assert padded["attention_mask"][1][-1] == 0
    with pytest.raises(ValueError, match="max_length"):
        processor.apply_chat_template(talks, tokenize=True, padding="max_length")


def test_masks_of_answers_and_of_visual_tokens(processor, video):
    talk = [
        {"role": "user", "content": [{"type": "video", "video": video}, *TALK[0]["content"]]},
        {"role": "assistant", "content": "Not this.", "train": False},
        *TALK[1:],
    ]
    made = processor(messages=[talk], return_labels=True, return_assistant_tokens_mask=True, return_mm_token_type_ids=True)
    assert torch.equal(made["assistant_masks"] == 1, made["labels"] != -100)
    assert processor.decode(made["input_ids"][made["assistant_masks"] == 1]) == "It is blue.<|im_end|>"
    types, ids = made["mm_token_type_ids"], made["input_ids"]
    assert torch.equal(types != 0, ids == processor.tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"))
    counts = processor._get_num_multimodal_tokens(image_sizes=[(40, 90)], video_sizes=[(8, 64, 64)])
    assert counts["num_image_tokens"] == [int((types == 1).sum())]
    assert counts["num_image_patches"] == [int((types == 1).sum()) // 4]
    assert counts["num_video_tokens"] == [int((types == 2).sum())]
    assert processor._get_num_multimodal_tokens(image_sizes=[(40, 90)], images_kwargs={"max_tiles": 1})["num_image_patches"] == [1]


def test_max_length_is_a_budget(processor):
    """Nothing is cut: tiles are reduced until the prompt fits, and text that does not fit is an error."""
    free = processor(messages=TALK)["input_ids"].shape[1]
    made = processor(messages=TALK, truncation=True, max_length=free - 1)
    assert made["input_ids"].shape[1] < free
    assert torch.equal(made["input_ids"], processor(messages=TALK, max_tokens=free - 1)["input_ids"])
    with pytest.raises(BudgetError, match="fit"):
        processor(messages=TALK, truncation=True, max_length=10)
    with pytest.raises(ValueError, match="the same"):
        processor(messages=TALK, max_length=100, max_tokens=200)


def test_image_part(processor):
    """Tiles of images alone are those of the prompt; several lists of images are one list."""
    images = [random_image(1, (90, 40)), random_image(2, (30, 30)), random_image(3, (40, 90))]
    made = processor.image_processor([images[:2], images[2:]], return_tensors="pt")
    whole = processor(text="?", images=images)
    assert torch.equal(made["pixel_values"], whole["pixel_values"])
    counts = [processor.image_processor.get_number_of_image_patches(image.height, image.width) for image in images]
    assert made["num_patches"].tolist() == counts
    assert counts[1] == 1 < min(counts[0], counts[2])
    assert processor.image_processor(images[0], crop_to_patches=False)["num_patches"].tolist() == [1]
    limited = processor.image_processor([{"image": images[0], "max_tiles": 2}], return_tensors="pt")
    assert torch.equal(limited["pixel_values"], processor(text="?", images=images[:1], max_tiles=2)["pixel_values"])
    with pytest.raises(TypeError, match="no setting size"):
        processor.image_processor(images, size=448)


def test_video_part(processor, video):
    frames = [random_image(seed, (32, 32)) for seed in range(3)]
    made = processor.video_processor([video, {"video": video, "start": 1.0, "fps": 4}, frames], return_tensors="pt")
    whole = processor(text="?", videos=[video, {"video": video, "start": 1.0, "fps": 4}, frames])
    assert torch.equal(made["pixel_values"], whole["pixel_values"])
    assert made["num_frames"].tolist() == [8, 8, 3]
    one = processor.video_processor(frames, num_frames=2)
    assert one["num_frames"].tolist() == [2]


def test_the_model_takes_visual_types(processor, make_model, make_config, small_tokenizer):
    model = make_model(make_config(tokenizer=small_tokenizer))
    inputs = processor(messages=TALK[:1], return_mm_token_type_ids=True)
    plain = {name: value for name, value in inputs.items() if name != "mm_token_type_ids"}
    assert torch.equal(model(**inputs).logits, model(**plain).logits)
    assert torch.equal(model.generate(**inputs, max_new_tokens=3), model.generate(**plain, max_new_tokens=3))
    hidden = model.base_model(**inputs).last_hidden_state
    assert torch.equal(hidden, model.base_model(**plain).last_hidden_state)


@pytest.mark.parametrize("make", ["bomb", "broken", "empty video", "one frame", "thin"])
def test_media_that_cannot_be_read_are_named(processor, tmp_path, make):
    """A bomb by its header, cut-off files and empty videos are errors that name the file or the number; odd shapes are not errors."""
    good = random_image()
    png = io.BytesIO()
    good.save(png, "PNG")
    if make == "bomb":
        content = png.getvalue()[:16] + struct.pack(">II", 2**31 - 1, 2**31 - 1) + png.getvalue()[24:]
        (tmp_path / "bomb.png").write_bytes(content)
        for image, name in ((tmp_path / "bomb.png", "bomb.png"), (content, "image 2")):
            with pytest.raises(MediaError, match=name):
                processor(text="?", images=[good, image])
    elif make == "broken":
        with pytest.raises(MediaError, match="image 2"):
            processor(text="?", images=[good, png.getvalue()[:60]])
    elif make == "empty video":
        (tmp_path / "empty.mp4").write_bytes(b"")
        with pytest.raises(MediaError, match=r"empty\.mp4"):
            processor(text="?", videos=[tmp_path / "empty.mp4"])
    elif make == "one frame":
        path = write_video(tmp_path / "one.mp4", grey_frames(1, 8, (64, 64)), fps=10)
        assert processor(text="?", videos=[path])["pixel_values"].shape[0] == 1
    else:
        made = processor(text="?", images=[Image.new("RGB", (1, 20000))])["pixel_values"]
        assert made.shape[0] == processor.image_processor.get_number_of_image_patches(20000, 1) <= 7
