"""`generate`: one and many images, one and many videos, batches with padding, streaming, beams; a batch answers as each row alone."""

from threading import Thread

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import CompileConfig, TextIteratorStreamer

from eagle_model import EagleProcessor
from eagle_model.padded import CACHE_FIELD
from tests.support.media import random_image


@pytest.fixture(scope="module")
def chat(make_model, make_config, small_tokenizer):
    """A model whose answers depend on what it sees, and its processor."""
    config = make_config(tokenizer=small_tokenizer, text_config={"initializer_range": 0.35, "num_hidden_layers": 3}, max_dynamic_tiles=4)
    model = make_model(config, seed=3)
    return model, EagleProcessor.for_config(small_tokenizer, config)


def talks():
    frames = [random_image(seed, (32, 32)) for seed in range(5)]
    timed = {"frames": frames, "times": [0.0, 0.5, 1.0, 1.5, 2.0], "fps": 2.0}
    return {
        "text": ("What is it?", [], []),
        "image": ("What is it?", [random_image(1)], []),
        "images": ("<image-2> or <image-1>?", [random_image(1), random_image(2, (90, 30))], []),
        "video": ("<video-1> What happens?", [], [timed]),
        "videos": ("Compare <video-2> to <video-1>.", [], [timed, frames[:2]]),
        "mixed": ("<video-1> has <image-1>?", [random_image(4)], [timed]),
    }


def answer(model, inputs, **options):
    options = {"max_new_tokens": 8, "do_sample": False, "min_new_tokens": 8} | options
    return model.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :]


def test_batch_equals_single(chat):
    model, processor = chat
    rows = list(talks().values())
    batch = processor(
        text=[text for text, _, _ in rows], images=[images for _, images, _ in rows], videos=[videos for _, _, videos in rows]
    )
    assert batch["attention_mask"][0, 0] == 0, "the batch should need padding on the left"
    together = answer(model, batch)
    alone = [answer(model, processor(text=text, images=images, videos=videos))[0] for text, images, videos in rows]
    assert torch.equal(together, torch.stack(alone))
    assert len({tuple(row.tolist()) for row in together}) > 3, "answers should depend on the prompt"


@pytest.mark.parametrize("name", ["text", "images", "mixed"])
def test_cache_equals_no_cache(chat, name):
    model, processor = chat
    text, images, videos = talks()[name]
    inputs = processor(text=text, images=images, videos=videos)
    assert torch.equal(answer(model, inputs), answer(model, inputs, use_cache=False))


def test_a_decoder_with_layers_without_rotation(make_model, make_config, small_tokenizer):
    """SmolLM3: with a cache, in a padded batch and in chunks the answers are those of whole prompts."""
    text = {"architectures": ["SmolLM3ForCausalLM"], "initializer_range": 0.35, "num_hidden_layers": 3, "no_rope_layers": [1, 0, 1]}
    config = make_config(tokenizer=small_tokenizer, text_config=text | {"pad_token_id": None}, max_dynamic_tiles=4)
    model, processor = make_model(config, seed=3), EagleProcessor.for_config(small_tokenizer, config)
    prompts = ["What is it?", "What is in <image-1>, and what is not?"]
    images = [[], [random_image(1)]]
    alone = [processor(text=text, images=own) for text, own in zip(prompts, images)]
    expected = torch.cat([answer(model, inputs, use_cache=False) for inputs in alone])
    assert torch.equal(torch.cat([answer(model, inputs) for inputs in alone]), expected)
    assert torch.equal(answer(model, processor(text=prompts, images=images)), expected)
    assert torch.equal(answer(model, alone[1], prefill_chunk_size=7), expected[1:])


def test_tokens_after_a_cache_equal_one_forward(chat):
    model, processor = chat
    rows = list(talks().values())[:3]
    inputs = processor(text=[text for text, _, _ in rows], images=[images for _, images, _ in rows])
    more = torch.randint(0, 250, (3, 5))
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(more)], 1)
    whole = model(torch.cat([inputs["input_ids"], more], 1), attention_mask=mask, pixel_values=inputs["pixel_values"]).logits[:, -5:]
    first = model(**inputs, use_cache=True)
    step = model(more[:, :2], attention_mask=mask[:, :-3], past_key_values=first.past_key_values, use_cache=True)
    rest = model(more[:, 2:], attention_mask=mask, past_key_values=step.past_key_values, use_cache=True)
    torch.testing.assert_close(torch.cat([step.logits, rest.logits], 1), whole, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("chunk", [16, 40, 1000])
def test_a_prompt_in_chunks(chat, chunk):
    """Chunks of a padded batch: in the first ones a row may have nothing but padding."""
    model, processor = chat
    batch = processor(text=["Hi", "a much longer question, with many words in it " * 2])
    assert batch["attention_mask"][0, :40].sum() == 0
    assert torch.equal(answer(model, batch, prefill_chunk_size=chunk), answer(model, batch))
    one = {name: value[:1] for name, value in batch.items()}
    assert torch.equal(answer(model, one, prefill_chunk_size=chunk), answer(model, batch)[:1])


@pytest.mark.parametrize("chunk", [16, 40, 1000])
@pytest.mark.parametrize("options", [{}, {"num_beams": 2, "num_return_sequences": 2}, {"cache_implementation": "static"}])
def test_a_prompt_with_media_in_chunks(chat, chunk, options):
    """Unequal prompts with images and videos: the answers are those of the whole prompts, and no more than a chunk runs at a time."""
    model, processor = chat
    rows = list(talks().values())
    batch = processor(
        text=[text for text, _, _ in rows], images=[images for _, images, _ in rows], videos=[videos for _, _, videos in rows]
    )
    expected = answer(model, batch, **options)
    tokens, tiles = [], []
    hooks = [
        model.language_model.model.layers[0].register_forward_pre_hook(lambda _, given: tokens.append(given[0].shape[0])),
        model.vision_model.register_forward_pre_hook(lambda _, given: tiles.append(given[0].shape[0])),
    ]
    assert torch.equal(answer(model, batch, prefill_chunk_size=chunk, **options), expected)
    for hook in hooks:
        hook.remove()
    width = len(rows) * options.get("num_beams", 1)
    assert max(tokens) <= chunk * width
    assert max(tiles) <= chunk // 4
    assert len(tokens) == -(-batch["input_ids"].shape[1] // chunk) + 7


@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static"}])
def test_a_prompt_without_padding_in_chunks_has_no_mask(chat, options, monkeypatch):
    """No mask of queries by keys is made for a chunk; the last chunk has one token."""
    model, processor = chat
    inputs = processor(text="<image-1> has <video-1>?", images=[random_image(4)], videos=talks()["video"][2])
    length = inputs["input_ids"].shape[1]
    expected = answer(model, inputs, use_cache=False)
    masks = []
    hook = model.language_model.model.layers[0].register_forward_pre_hook(lambda _, given: masks.append(given[1].mask))
    for size in (7, length - 1, length):
        assert torch.equal(answer(model, inputs, prefill_chunk_size=size, **options), expected)
        chunks = -(-length // size)
        assert masks[:chunks] == [None] * chunks
        assert all(mask is None for mask in masks) or options
        masks.clear()
    hook.remove()


def test_tiles_are_encoded_in_groups(chat, monkeypatch):
    """Without gradients memory for the tower's activations does not grow with the number of tiles; with them one call sees all tiles."""
    model, _ = chat
    tiles = torch.randint(0, 256, (9, 32, 32, 3), dtype=torch.uint8)
    seen = []
    hook = model.vision_model.register_forward_pre_hook(lambda _, given: seen.append(given[0].shape[0]))
    whole = model.encode_tiles(tiles)
    assert whole.requires_grad
    monkeypatch.setattr("eagle_model.modules.ENCODED_TILES", 4)
    model.encode_tiles(tiles)
    with torch.no_grad():
        torch.testing.assert_close(model.encode_tiles(tiles), whole.detach(), atol=1e-5, rtol=1e-5)
        model.encode_tiles(tiles[:0])
        ids = torch.full((1, 9 * model.tokens_per_tile), model.config.image_token_index)
        model(ids, pixel_values=tiles)
    hook.remove()
    assert seen == [9, 9, 4, 4, 1, 1, 4, 4, 1]


def test_chunks_after_a_cache(chat):
    """The second turn of a conversation in chunks, its first turn being in the cache: only tiles of the new tokens are passed."""
    model, processor = chat
    first = processor(text="<image-1> is what?", images=[random_image(1)])
    made = model.generate(**first, max_new_tokens=6, min_new_tokens=6, do_sample=False, return_dict_in_generate=True)
    inputs = processor(text="<video-1> What happens?", videos=talks()["video"][2])
    ids = torch.cat([made.sequences, inputs["input_ids"]], 1)
    # Without a mask transformers makes one from the ids, where an answer may hold the token that pads.
    whole = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    whole["pixel_values"] = torch.cat([first["pixel_values"], inputs["pixel_values"]])
    expected = model.generate(**whole, max_new_tokens=6, min_new_tokens=6, do_sample=False)
    cache = made[CACHE_FIELD]
    known = cache.get_seq_length()
    assert known == made.sequences.shape[1] - 1
    options = {CACHE_FIELD: cache, "prefill_chunk_size": 10, "attention_mask": whole["attention_mask"]}
    again = model.generate(ids, pixel_values=inputs["pixel_values"], max_new_tokens=6, min_new_tokens=6, do_sample=False, **options)
    assert torch.equal(again, expected)
    with pytest.raises(ValueError, match="visual tokens in input_ids, but"):
        model.generate(**first | {"pixel_values": first["pixel_values"][1:]}, prefill_chunk_size=10, max_new_tokens=1)


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}])
def test_a_cache_of_fixed_size(chat, options):
    model, processor = chat
    rows = list(talks().values())
    batch = processor(
        text=[text for text, _, _ in rows], images=[images for _, images, _ in rows], videos=[videos for _, _, videos in rows]
    )
    assert torch.equal(answer(model, batch, cache_implementation="static", **options), answer(model, batch, **options))


def test_decoding_compiles_to_one_graph(chat):
    """With a cache of fixed size no step of an answer differs from another for the compiler, and nothing breaks the graph."""
    model, processor = chat
    inputs = processor(text=["What is it?", "<image-1> is a longer question?"], images=[[], [random_image(1)]])
    options = CompileConfig(backend="eager", mode=None, fullgraph=True)
    options._compile_all_devices = True
    expected = answer(model, inputs)
    torch._dynamo.reset()
    counters.clear()
    assert torch.equal(answer(model, inputs, cache_implementation="static", compile_config=options), expected)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


def test_what_cannot_be_generated_is_said(chat):
    model, processor = chat
    batch = processor(text="Hi")
    with pytest.raises(TypeError, match="output_attentions"):
        answer(model, batch, output_attentions=True, return_dict_in_generate=True)
    with pytest.raises(ValueError, match="num_beam_groupz"):
        answer(model, batch, num_beam_groupz=2)
    for known_elsewhere in ("mm_encoder_outputs", "cu_seq_lens_q"):
        with pytest.raises((TypeError, ValueError), match=known_elsewhere):
            answer(model, batch, **{known_elsewhere: {"image": torch.ones(1)}})
    with pytest.raises(ValueError, match="row 0"):
        answer(model, batch | {"attention_mask": torch.zeros_like(batch["attention_mask"])})


def test_greedy_is_the_largest_logit(chat):
    model, processor = chat
    inputs = processor(text="What?", images=[random_image(1)])
    generated = answer(model, inputs)
    ids = torch.cat([inputs["input_ids"], generated], 1)
    logits = model(ids, pixel_values=inputs["pixel_values"]).logits[0, inputs["input_ids"].shape[1] - 1 : -1]
    logits[:, model.config.text_config.eos_token_id] = -torch.inf  # min_new_tokens forbids the end
    assert torch.equal(logits.argmax(-1), generated[0])


def test_beams_and_several_answers(chat):
    model, processor = chat
    rows = [talks()[name] for name in ("image", "text", "images")]
    batch = processor(text=[text for text, _, _ in rows], images=[images for _, images, _ in rows])
    beams = answer(model, batch, num_beams=3, num_return_sequences=2, min_new_tokens=0)
    assert beams.shape[0] == 6
    alone = answer(model, processor(text=rows[2][0], images=rows[2][1]), num_beams=3, num_return_sequences=2, min_new_tokens=0)
    length = min(beams.shape[1], alone.shape[1])
    assert torch.equal(beams[4:, :length], alone[:, :length])
    torch.manual_seed(0)
    assert answer(model, batch, do_sample=True, num_return_sequences=3).shape == (9, 8)


def test_streaming(chat, small_tokenizer):
    model, processor = chat
    inputs = processor(text="What is it?", images=[random_image(1)])
    streamer = TextIteratorStreamer(small_tokenizer, skip_prompt=True, skip_special_tokens=False, timeout=60)
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "streamer": streamer}
    thread = Thread(target=model.generate, kwargs={**inputs, **options})
    thread.start()
    pieces = list(streamer)
    thread.join()
    assert "".join(pieces) == small_tokenizer.decode(answer(model, inputs)[0])


def test_arguments_that_a_release_of_transformers_adds(chat, monkeypatch):
    """Whatever `generate` hands over for models of other kinds does not reach `forward`, and changes no answer."""
    from transformers import GenerationMixin

    model, processor = chat
    inputs = processor(text="What?", images=[random_image(1)])
    expected = answer(model, inputs)
    real = GenerationMixin.prepare_inputs_for_generation

    def newer(self, *args, **kwargs):
        return real(self, *args, **kwargs) | {"argument_of_tomorrow": torch.ones(1), "another": True}

    monkeypatch.setattr(GenerationMixin, "prepare_inputs_for_generation", newer)
    assert torch.equal(answer(model, inputs), expected)
    with pytest.raises(TypeError, match="argument_of_tomorrow"):
        model(**inputs, argument_of_tomorrow=1)


def test_stop_strings_take_the_tokenizer(chat, small_tokenizer):
    model, processor = chat
    inputs = processor(text="What?", images=[random_image(1)])
    whole = answer(model, inputs, min_new_tokens=0)[0]
    word = small_tokenizer.decode(whole[2])
    stopped = answer(model, inputs, min_new_tokens=0, stop_strings=[word], tokenizer=small_tokenizer)[0]
    first = next(index for index in range(len(whole)) if word in small_tokenizer.decode(whole[: index + 1]))
    assert torch.equal(stopped, whole[: first + 1])
    assert len(stopped) < len(whole)


def test_generate_gives_hidden_states(chat):
    model, processor = chat
    inputs = processor(text="What?", images=[random_image(1)])
    result = answer_dict(model, inputs, output_hidden_states=True)
    assert len(result.hidden_states) == 8
    assert [len(states) for states in result.hidden_states] == [model.config.text_config.num_hidden_layers + 1] * 8
    assert result.hidden_states[0][0].shape[:2] == inputs["input_ids"].shape
    assert result.hidden_states[1][-1].shape == (1, 1, model.config.text_config.hidden_size)


def answer_dict(model, inputs, **options):
    return model.generate(**inputs, max_new_tokens=8, min_new_tokens=8, do_sample=False, return_dict_in_generate=True, **options)


def test_stops_at_the_end_token(chat, small_tokenizer):
    model, _ = chat
    assert model.generation_config.eos_token_id == small_tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert model.generation_config.pad_token_id == small_tokenizer.pad_token_id
