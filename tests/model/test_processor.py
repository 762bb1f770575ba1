"""The processor: the same ids as the prompt, tiles in the order of the prompt, budgets kept, and files."""

import base64
import io
import json
import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor

from eagle_model import EagleProcessor, PromptError, VideoRef, VideoSpan, encode, register, render
from eagle_model.visual import BudgetError, VisualSpec, as_video, load_image, size_of
from eagle_sampling import MediaError
from eagle_tiling import load_rgb, select_grid, tile_image
from tests.support.media import grey_frames, random_image, write_video

SETTINGS = {"tile_size": 32, "tokens_per_tile": 4, "max_tiles": 6}


@pytest.fixture(scope="module")
def processor(small_tokenizer):
    return EagleProcessor(small_tokenizer, **SETTINGS)


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    """Three seconds at 10 frames a second; frame i is grey of 8 i."""
    return write_video(tmp_path_factory.mktemp("video") / "grey.mp4", grey_frames(30, 8, (64, 64)), fps=10)


def test_image(processor, small_tokenizer):
    image = random_image()
    inputs = processor(text="What?", images=[image])
    grid = select_grid(50, 40, max_tiles=6, tile_size=32)
    tiles = tile_image(image, grid, tile_size=32)
    assert inputs["pixel_values"].dtype == torch.uint8
    assert np.array_equal(inputs["pixel_values"].numpy(), tiles)
    expected = encode(render([{"role": "user", "content": "What?"}], images=[4 * len(tiles)], add_generation_prompt=True), small_tokenizer)
    assert inputs["input_ids"][0].tolist() == expected.input_ids.tolist()
    assert inputs["attention_mask"].all()


def test_forms_of_one_conversation(processor, tmp_path):
    image = random_image()
    image.save(tmp_path / "a.png")
    content = io.BytesIO()
    image.save(content, "PNG")
    message = {"role": "user", "content": "<image-1>What?"}

    def blocks(block):
        return [{"role": "user", "content": [block, {"type": "text", "text": "What?"}]}]

    encoded = base64.b64encode(content.getvalue()).decode()
    rendered = processor.apply_chat_template(blocks({"type": "image", "image": image}), add_generation_prompt=True)
    forms = [
        processor(text="<image-1>What?", images=image),
        processor(messages=[message], images=[tmp_path / "a.png"]),
        processor(messages=[message], images=[content.getvalue()]),
        processor(messages=[message], images=[np.asarray(image)]),
        processor(messages=[message], images=[torch.from_numpy(np.asarray(image).copy())]),
        processor(messages=blocks({"type": "image", "image": image})),
        processor(messages=blocks({"type": "image", "path": str(tmp_path / "a.png")})),
        processor(messages=blocks({"type": "image_url", "image_url": {"url": f"data:image/png;base64,{encoded}"}})),
        processor(text=[rendered], images=[[image]]),
        processor.apply_chat_template(
            blocks({"type": "image", "image": image}), add_generation_prompt=True, tokenize=True, return_tensors="pt"
        ),
    ]
    for form in forms[1:]:
        assert torch.equal(form["input_ids"], forms[0]["input_ids"])
        # Tensors are resized by torch, within 2/255 of Pillow.
        assert (form["pixel_values"].int() - forms[0]["pixel_values"].int()).abs().max() <= 2


def test_blocks_that_only_mark_where_media_stand(processor, video):
    first, second = random_image(1), random_image(2)
    bare = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "and"}, {"type": "image"}, {"type": "video"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "Yes."}]},
    ]
    filled = [{"role": "user", "content": [{"type": "image", "image": first}, {"type": "text", "text": "and"}]}, bare[1]]
    filled[0]["content"] += [{"type": "image", "image": second}, {"type": "video", "video": str(video)}]
    text = processor.apply_chat_template(bare)
    assert text == processor.apply_chat_template(filled)
    expected = processor(messages=filled)
    for inputs in (
        processor(messages=bare, images=[first, second], videos=[video]),
        processor(text=text, images=[first, second], videos=video),
    ):
        assert np.array_equal(inputs["input_ids"], expected["input_ids"])
        assert np.array_equal(inputs["pixel_values"], expected["pixel_values"])
    with pytest.raises(PromptError, match="2 image blocks have no image in them, and 1 images are given in images; give as many"):
        processor(messages=bare, images=[first], videos=[video])
    with pytest.raises(PromptError, match="2 image blocks have no image in them, and 0 images"):
        processor.apply_chat_template(bare, tokenize=True)
    filled[0]["content"][2] = {"type": "image"}
    with pytest.raises(PromptError, match="some image blocks have a medium in them and others have none"):
        processor(messages=filled, images=[second])


def test_words_that_look_like_placeholders_are_text_in_messages_with_media(processor):
    a, b, c = random_image(1, (30, 30)), random_image(2, (60, 30)), random_image(3, (90, 30))

    def user(*blocks):
        return {"role": "user", "content": [block if isinstance(block, str) else {"type": "image", "image": block} for block in blocks]}

    def text(talk):
        ids = processor(messages=talk)["input_ids"][0]
        return processor.tokenizer.decode(ids).replace("<IMG_CONTEXT>", "").replace("<img></img>", "*")

    talk = [user(a, b, "Which <image> tag?"), {"role": "assistant", "content": "That <image>."}, user("And", c, " in <video>?")]
    shown = text(talk)
    assert "user\n<image 1>*<image 2>*Which <image> tag?" in shown
    assert "assistant\nThat <image>.<|im_end|>" in shown
    assert "user\nAnd<image 3>* in <video>?" in shown
    assert "user\nWhat is <video> in HTML?<" in text([user("What is <video> in HTML?")])
    later = text([user(a, "Look."), {"role": "assistant", "content": "ok"}, {"role": "user", "content": "Is <image> a tag?"}])
    assert "user\nIs <image> a tag?<" in later
    answered = text([user("Draw."), {"role": "assistant", "content": [{"type": "image", "image": a}, "Done."]}, user("Again.")])
    assert "assistant\n<image 1>*Done.<" in answered
    given = processor(messages=[user("<image>?")], images=[a])
    assert torch.equal(given["input_ids"], processor(text="<image-1>?", images=[a])["input_ids"])


def test_tiles_follow_the_prompt(processor):
    small, large = random_image(1, (30, 30)), random_image(2, (100, 30))
    inputs = processor(text="<image-2> then <image-1>", images=[small, large])
    parts = [tile_image(image, select_grid(*image.size, max_tiles=6, tile_size=32), tile_size=32) for image in (large, small)]
    assert np.array_equal(inputs["pixel_values"].numpy(), np.concatenate(parts))


def test_file_addresses(processor, tmp_path):
    random_image().save(tmp_path / "a b%.png")
    address = (tmp_path / "a b%.png").as_uri()
    assert "a%20b%25.png" in address
    assert load_image(address).size == load_image(str(tmp_path / "a b%.png")).size == (50, 40)


def test_exif_alpha_and_modes(processor):
    image = random_image(3, (60, 20))
    exif = Image.Exif()
    exif[0x0112] = 6  # shown rotated
    content = io.BytesIO()
    image.save(content, "JPEG", exif=exif)
    assert size_of(load_image(content.getvalue())) == (20, 60)
    for mode in ("RGBA", "L", "P", "CMYK"):
        assert load_image(image.convert(mode)).mode == "RGB"
        assert processor(text="x", images=[image.convert(mode)])["pixel_values"].shape[-1] == 3


def test_video_file(processor, video, small_tokenizer):
    inputs = processor(text="Describe <video-1>", videos=[video])
    # 3 seconds at 2 a second are 6 frames; a video gets at least 8.
    assert inputs["pixel_values"].shape == (8, 32, 32, 3)
    text = small_tokenizer.decode(inputs["input_ids"][0]).replace("<IMG_CONTEXT>", "")
    assert "Describe The first video sampled with 2.67 fps: Frame 1 sample at 0.00s: <img></img>Frame 2 sample at 0.40s: " in text
    assert "Frame 8 sample at 2.90s: <img></img><|im_end|>" in text
    means = inputs["pixel_values"].float().mean((1, 2, 3))
    assert means[0] < 6
    assert (means.diff() > 15).all()
    clip = processor(text="x", videos=[{"path": video, "start": 1.0, "end": 2.0}])
    text = small_tokenizer.decode(clip["input_ids"][0])
    assert "sampled with 8.00 fps: Frame 1 sample at 0.00s: " in text
    assert "Frame 8 sample at 0.90s: " in text
    for block in ({"video": {"path": video}, "start": 1.0, "end": 2.0}, {"video": {"path": video, "start": 1.0}, "end_time": 2.0}):
        again = processor(messages=[{"role": "user", "content": [{"type": "video", **block}, "x"]}])
        assert torch.equal(again["input_ids"], clip["input_ids"])


def test_video_of_frames_and_pages(processor, small_tokenizer):
    frames = [random_image(seed, (64, 32)) for seed in range(3)]
    timed = processor(text="x", videos=[{"frames": frames, "times": [0.0, 2.0, 4.0], "fps": 0.5}])
    pages = processor(text="x", videos=[frames])
    array = processor(text="x", videos=[np.stack([np.asarray(frame) for frame in frames])])
    assert torch.equal(pages["input_ids"], array["input_ids"])
    assert torch.equal(pages["pixel_values"], array["pixel_values"])
    assert "sampled with 0.50 fps: Frame 1 sample at 0.00s: " in small_tokenizer.decode(timed["input_ids"][0])
    assert "The first video: Frame 1: " in small_tokenizer.decode(pages["input_ids"][0])
    blocks = processor(messages=[{"role": "user", "content": [{"type": "video", "video": frames}, {"type": "text", "text": "x"}]}])
    assert torch.equal(blocks["input_ids"], pages["input_ids"])
    block = {"type": "video", "video": frames, "times": [0.0, 2.0, 4.0], "fps": 0.5}
    assert torch.equal(processor(messages=[{"role": "user", "content": [block, "x"]}])["input_ids"], timed["input_ids"])


@pytest.mark.parametrize("budget", [200, 240, 320, 500, 2000])
def test_budget_is_kept_and_used(processor, video, budget):
    messages = [{"role": "user", "content": "<image-1> and <video-1> <image-2>"}]
    row = processor.process(messages, [random_image(1, (200, 100)), random_image(2)], [video], max_tokens=budget + 80)
    assert len(row.input_ids) <= budget + 80
    assert (row.input_ids == processor.tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>")).sum() == 4 * len(row.tiles)
    free = processor.process(messages, [random_image(1, (200, 100)), random_image(2)], [video])
    if budget == 2000:
        assert np.array_equal(row.tiles, free.tiles)
    elif budget == 200:
        assert len(row.tiles) < len(free.tiles)


def test_too_small_a_budget_is_said(processor, video):
    with pytest.raises(BudgetError, match="100 tokens"):
        processor(text="x", videos=[video], max_tokens=100)


def test_batch_pads_on_the_left(processor):
    inputs = processor(text=["Hi", "What is this?"], images=[None, [random_image()]])
    assert inputs["attention_mask"][0, 0] == 0
    assert inputs["attention_mask"][:, -1].all()
    assert (inputs["input_ids"][inputs["attention_mask"] == 0] == processor.tokenizer.pad_token_id).all()
    right = processor(text=["Hi", "What is this?"], images=[None, [random_image()]], padding_side="right", return_tensors="np")
    assert right["attention_mask"][:, 0].all()
    assert isinstance(right["input_ids"], np.ndarray)
    assert "pixel_values" not in processor(text=["Hi", "What is this?"])


def test_labels(processor, small_tokenizer):
    messages = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
    inputs = processor(messages=messages, return_labels=True)
    expected = encode(render(messages), small_tokenizer)
    assert inputs["labels"][0].tolist() == expected.labels.tolist()
    assert inputs["input_ids"][0].tolist() == expected.input_ids.tolist()


def test_chatml_strings(processor, small_tokenizer):
    messages = [{"role": "system", "content": "S"}, {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A\nB"}]
    again = processor(text=processor.apply_chat_template(messages))
    assert again["input_ids"][0].tolist() == encode(render(messages), small_tokenizer).input_ids.tolist()
    with pytest.raises(PromptError, match="ChatML"):
        processor(text="before <|im_start|>user\nQ<|im_end|>\n")
    with pytest.raises(PromptError, match="ChatML"):
        processor(text="<|im_start|>user\nQ<|im_end|>\nafter")
    for open_turn in ("<|im_start|>assistant\nSure,", "<|im_start|>user\nQ<|im_start|>assistant\n"):
        with pytest.raises(PromptError, match="isn't closed"):
            processor(text=f"<|im_start|>user\nQ<|im_end|>\n{open_turn}")
    with pytest.raises(ValueError, match="template"):
        processor.apply_chat_template(messages, chat_template="{{ messages }}")
    # The tokenizer's own template is the same text.
    assert small_tokenizer.apply_chat_template(messages, tokenize=False) == processor.apply_chat_template(messages)


def test_save_and_load(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "processor_config.json").read_text())
    assert written["processor_class"] == "EagleProcessor"
    again = EagleProcessor.from_pretrained(tmp_path)
    assert again.spec == processor.spec == VisualSpec(**SETTINGS)
    a, b = (each(text="<image-1> 12?", images=[random_image()]) for each in (processor, again))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert EagleProcessor.from_pretrained(tmp_path, max_tiles=2).spec.max_tiles == 2
    register()
    assert AutoProcessor.from_pretrained(tmp_path).spec == processor.spec
    assert "tile_size" in repr(again)


def test_released_like_folder(small_tokenizer, make_config, tmp_path):
    """Without settings of ours they come from the model's configuration."""
    make_config(tokenizer=small_tokenizer, max_dynamic_tiles=9).save_pretrained(tmp_path)
    small_tokenizer.save_pretrained(tmp_path)
    (tmp_path / "processor_config.json").write_text(json.dumps({"processor_class": "Eagle2_5_VLProcessor", "tokens_per_tile": 4}))
    settings = EagleProcessor.from_pretrained(tmp_path).spec
    assert (settings.tile_size, settings.tokens_per_tile, settings.max_tiles, settings.thumbnail) == (32, 4, 9, True)
    register()
    assert isinstance(AutoProcessor.from_pretrained(tmp_path), EagleProcessor)


def test_wrong_use_is_said(processor, tmp_path):
    with pytest.raises(PromptError, match="text or messages"):
        processor(images=[random_image()])
    with pytest.raises(ValueError, match="2 lists"):
        processor(text=["a", "b"], images=[random_image()])
    with pytest.raises(ValueError, match="lists in some conversations"):
        processor(text=["a", "b"], images=[random_image(), [random_image()]])
    with pytest.raises(TypeError, match="images come first"):
        processor("<image-1> What?", random_image())
    with pytest.raises(PromptError, match="<image-2>"):
        processor(text="<image-2>", images=[random_image()])
    with pytest.raises(PromptError, match="once"):
        processor(messages=[{"role": "user", "content": [{"type": "image", "image": random_image()}]}], images=[random_image()])
    with pytest.raises(PromptError, match="'audio'"):
        processor(messages=[{"role": "user", "content": [{"type": "audio", "audio": 1}]}])
    for tokenize in (True, False):
        with pytest.raises(PromptError, match="message 0 has content of type NoneType"):
            processor.apply_chat_template([{"role": "user", "content": None}], tokenize=tokenize)
        with pytest.raises(PromptError, match=r"no messages|needs text or messages"):
            processor.apply_chat_template([], tokenize=tokenize)
        with pytest.raises(ValueError, match="tools"):
            processor.apply_chat_template([{"role": "user", "content": "x"}], tokenize=tokenize, tools=[{"type": "function"}])
        with pytest.raises(ValueError, match="continue_final_message"):
            processor.apply_chat_template([{"role": "user", "content": "x"}], tokenize=tokenize, continue_final_message=True)
    with pytest.raises(PromptError, match="text or messages"):
        processor(text=[])
    with pytest.raises(PromptError, match="no messages"):
        processor(messages=[[]])
    with pytest.raises(TypeError, match="max_token; is max_tokens meant"):
        processor(text="x", max_token=3)
    with pytest.raises(TypeError, match="tile_size: the model was trained with it"):
        processor(text="x", tile_size=64)
    with pytest.raises(ValueError, match="num_frames is given together with fps"):
        processor(text="x", num_frames=2, fps=1.0)
    with pytest.raises(ValueError, match=r"num_frames is 2\.5; it must be a whole number"):
        processor(text="x", num_frames=2.5)
    with pytest.raises(ValueError, match="max_frames is '3'; it must be a whole number"):
        processor(text="x", max_frames="3")
    with pytest.raises(ValueError, match="max_tiles is 0"):
        processor(text="x", max_tiles=0)
    for wrong in (0, 2.5, "many", True):
        with pytest.raises(ValueError, match=f"max_tiles of an image is {wrong!r}; it must be a whole number"):
            processor(text="<image-1>", images=[{"image": random_image(), "max_tiles": wrong}])
    for wrong in ("soon", True, float("nan")):
        with pytest.raises(ValueError, match=f"start of a video is {wrong!r}; it must be a number of seconds"):
            processor(text="<video-1>", videos=[{"path": "a.mp4", "start": wrong}])
    with pytest.raises(TypeError, match="max_tiles is given twice"):
        processor(text="x", max_tiles=2, images_kwargs={"max_tiles": 3})
    with pytest.raises(ValueError, match="pad_to_multiple_of=8"):
        processor(text="x", pad_to_multiple_of=8)
    with pytest.raises(TypeError, match="max_tile; is max_tiles meant"):
        EagleProcessor.from_pretrained(tmp_path, max_tile=4)
    with pytest.raises(PromptError, match="no image"):
        processor(messages=[{"role": "user", "content": [{"type": "image"}]}])
    with pytest.raises(MediaError, match=r"missing\.png"):
        processor(text="x", images=[tmp_path / "missing.png"])
    with pytest.raises(MediaError):
        processor(text="x", videos=[tmp_path / "missing.mp4"])
    with pytest.raises(ValueError, match="network"):
        processor(text="x", images=["https://example.com/a.png"])
    with pytest.raises(ValueError, match="base64"):
        processor(text="x", images=["data:image/png;base64,???"])
    with pytest.raises(ValueError, match="2 frames but 1 times"):
        processor(text="x", videos=[{"frames": [random_image(), random_image()], "times": [0.0]}])
    with pytest.raises(ValueError, match="times can't be given for a video that is a file"):
        processor(text="x", videos=[{"path": "a.mp4", "times": [1.0]}])
    with pytest.raises(ValueError, match="start can't be given for a video that is a list of frames"):
        processor(text="x", videos=[{"frames": [random_image()], "start": 1.0}])
    with pytest.raises(ValueError, match="without frames"):
        as_video({})
    for content in (b"...", io.BytesIO(b"...")):
        with pytest.raises(ValueError, match="save it and give its path"):
            processor(text="x", videos=[content])
    with pytest.raises(ValueError, match="padding_side"):
        processor(text="x", padding_side="middle")


def test_settings_are_not_attributes(processor):
    """Setting one would be without effect, since plans are made from `spec`."""
    with pytest.raises(AttributeError, match=r"from_pretrained\(FOLDER, max_tiles=2\)"):
        processor.max_tiles = 2
    assert not hasattr(processor, "max_tiles")
    assert pickle.loads(pickle.dumps(processor)).spec == processor.spec


def test_what_transformers_passes_is_accepted(processor):
    messages = [{"role": "user", "content": "x"}]
    plain = processor(messages=messages)
    for options in ({"padding": True, "truncation": False}, {"padding": "longest", "return_attention_mask": True}):
        assert torch.equal(processor(messages=messages, **options)["input_ids"], plain["input_ids"])
    options = {"tools": None, "documents": None, "continue_final_message": False, "return_dict": True, "processor_kwargs": {}}
    made = processor.apply_chat_template(messages, tokenize=True, add_generation_prompt=True, return_tensors="pt", **options)
    assert torch.equal(made["input_ids"], plain["input_ids"])


def test_same_ids_as_training(processor, video, small_tokenizer):
    """What a trainer builds from a plan and what the processor builds from media are the same prompt."""
    messages = [{"role": "user", "content": "<image-1>?"}, {"role": "assistant", "content": "ok"}]
    image = random_image()
    tiles = tile_image(load_rgb(image), select_grid(*image.size, max_tiles=6, tile_size=32), tile_size=32)
    span = VideoSpan([0.0, 0.4, 0.8, 1.2, 1.7, 2.1, 2.5, 2.9], 8 / 3, 4)
    expected = encode(render(messages, images=[4 * len(tiles)], videos=[span]), small_tokenizer)
    row = processor.process(messages, [image], [video])
    assert row.input_ids.tolist() == expected.input_ids.tolist()
    assert row.labels.tolist() == expected.labels.tolist()
    assert np.array_equal(row.tiles[8:], tiles), "the video has no placeholder, so it comes first"


def test_settings_of_a_call_and_of_a_medium(processor, video):
    """What InternVL's and Qwen-VL's users set per call, in their spellings; the processor itself stays as it is."""
    image, talk = random_image(size=(100, 30)), "<image-1><video-1>?"

    def tiles(**options):
        return len(processor(text=talk, images=[image], videos=[video], **options)["pixel_values"])

    frames, image_tiles = 8, len(processor(text="?", images=[image])["pixel_values"])
    assert tiles() == frames + image_tiles
    assert tiles(max_tiles=1) == tiles(images_kwargs={"max_tiles": 1}) == frames + 1
    assert tiles(num_frames=4) == tiles(videos_kwargs={"num_frames": 4}) == 4 + image_tiles
    assert tiles(fps=10.0) == 30 + image_tiles
    assert tiles(fps=1.0, min_frames=1) == 3 + image_tiles

    def blocks(image_block, video_block):
        content = [{"type": "image", "image": image} | image_block, {"type": "video", "video": str(video)} | video_block]
        return [{"role": "user", "content": [*content, {"type": "text", "text": "?"}]}]

    for image_block, video_block, expected in (
        ({}, {"nframes": 3}, 3 + image_tiles),
        ({"max_tiles": 1}, {"max_frames": 5}, 5 + 1),
        ({}, {"fps": 10.0, "start": 1.0}, 20 + image_tiles),
        ({}, {"fps": 1.0, "min_frames": 2}, 3 + image_tiles),
    ):
        made = processor.apply_chat_template(
            blocks(image_block, video_block), tokenize=True, add_generation_prompt=True, return_tensors="pt"
        )
        assert len(made["pixel_values"]) == expected
    two = processor(text="<video-1><video-2>", videos=[{"video": str(video), "num_frames": 2}, video])
    assert len(two["pixel_values"]) == 2 + 8, "one video's setting is not the other's"
    assert tiles() == frames + image_tiles
    with pytest.raises(AttributeError):
        processor.spec.max_tiles = 2


def test_a_batch_of_one_image_each(processor):
    flat = processor(text=["<image-1>a", "<image-1>b"], images=[random_image(0), random_image(1)])
    lists = processor(text=["<image-1>a", "<image-1>b"], images=[[random_image(0)], [random_image(1)]])
    assert all(torch.equal(flat[name], lists[name]) for name in lists)


def test_pickled_after_use(processor, video):
    first = processor(text="<video-1>?", videos=[video])
    again = pickle.loads(pickle.dumps(processor))(text="<video-1>?", videos=[video])
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_system_prompt_and_budget_travel(processor, small_tokenizer, video, tmp_path):
    made = EagleProcessor(small_tokenizer, **SETTINGS, system_prompt="Be brief.", max_tokens=90, strategy="uniform", max_frames=9)
    made.save_pretrained(tmp_path)
    again = EagleProcessor.from_pretrained(tmp_path)
    assert (again.system_prompt, again.max_tokens, again.spec) == ("Be brief.", 90, made.spec)
    expected = encode(render([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "x"}]), small_tokenizer)
    assert again.process([{"role": "user", "content": "x"}]).input_ids.tolist() == expected.input_ids.tolist()
    own = [{"role": "system", "content": "Be long."}, {"role": "user", "content": "x"}]
    assert again.process(own).input_ids.tolist() == encode(render(own), small_tokenizer).input_ids.tolist()
    with pytest.raises(BudgetError, match="90 tokens"):
        again(text="<video-1>?", videos=[video])
    assert len(again(text="<video-1>?", videos=[video], max_tokens=1000)["pixel_values"]) == 9


def test_documents(processor, tmp_path):
    """A PDF and a list of page images are pages: no times in the prompt, all pages wanted."""
    pages = [random_image(seed, (60, 90)) for seed in range(3)]
    pages[0].save(tmp_path / "a.pdf", save_all=True, append_images=pages[1:])
    for document in (tmp_path / "a.pdf", pages):
        made = processor(text="<video-1>?", videos=[document])
        assert len(made["pixel_values"]) == 3
        assert "Frame 3: <img>" in processor.tokenizer.decode(made["input_ids"][0])


def test_an_answer_that_has_begun_is_continued(processor):
    """The prompt is that of the whole conversation without the end of its last message; another last message is refused."""
    messages = [{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": "It is a <|im_end|>"}]
    whole = processor.process(messages).input_ids
    begun = processor.apply_chat_template(messages, tokenize=True, continue_final_message=True)
    assert begun["input_ids"][0] == whole[:-2].tolist()
    assert begun["input_ids"][0] == processor.process(messages, continue_final_message=True).input_ids.tolist()
    for wrong in ({"conversation": messages[:1]}, {"conversation": messages, "add_generation_prompt": True}):
        with pytest.raises(PromptError, match="continue_final_message"):
            processor.apply_chat_template(tokenize=True, continue_final_message=True, **wrong)


@pytest.mark.parametrize(
    ("ref", "words"),
    [
        (VideoRef(), "it has neither"),
        (VideoRef("a.mp4", frames=("1.jpg",)), "it has both"),
        (VideoRef(frames=("1.jpg",), times=(0.0, 1.0)), "1 frames but 2 times"),
    ],
)
def test_references_to_nothing_or_to_two_things(processor, ref, words):
    with pytest.raises(ValueError, match=words):
        processor(text="<video-1>", videos=[ref])


def test_numbers_are_not_videos_text_or_messages(processor):
    with pytest.raises(ValueError, match=r"a video must be a path, .*; got int"):
        processor(text="<video-1>", videos=[5])
    for arguments in ({"text": 5}, {"messages": 5}):
        with pytest.raises(TypeError, match=r"the processor takes text .* or messages .*, not int"):
            processor(**arguments)


def test_a_spec_has_no_more_tiles_than_grids():
    with pytest.raises(ValueError, match="max_tiles is 65; it must be at most 64"):
        VisualSpec(max_tiles=65)
