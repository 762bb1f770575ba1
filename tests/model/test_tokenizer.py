"""Tokenizers: training a small one, adding Eagle's tokens to another's, and saying what is missing."""

import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from eagle_model.prompt import EAGLE_TOKENS, IGNORE_INDEX, PromptError, TextEncoder, encode, render
from eagle_model.tokenizer import add_eagle_tokens, load_tokenizer, train_tokenizer


def plain_tokenizer():
    backend = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend)


@given(st.text(max_size=40))
@settings(deadline=None, max_examples=80)
def test_any_text_survives(small_tokenizer, text):
    import unicodedata

    ids = small_tokenizer(text, add_special_tokens=False)["input_ids"]
    assert small_tokenizer.decode(ids) == unicodedata.normalize("NFC", text)


def test_trained_tokenizer(small_tokenizer):
    assert len(small_tokenizer) <= 400
    ids = small_tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_start|>", "<|im_end|>", *EAGLE_TOKENS])
    assert ids == list(range(len(small_tokenizer) - 14, len(small_tokenizer)))
    assert len(small_tokenizer("2024")["input_ids"]) == 4
    assert len(small_tokenizer(" colour")["input_ids"]) == 1
    assert small_tokenizer.eos_token == "<|im_end|>"
    assert small_tokenizer.padding_side == "left"
    again = train_tokenizer(["What is the colour?", "a red circle"] * 5, 300)
    assert again.get_vocab() == train_tokenizer(["What is the colour?", "a red circle"] * 5, 300).get_vocab()
    with pytest.raises(ValueError, match="270"):
        train_tokenizer(["a"], 100)


def test_decoding_keeps_grounding_markup(small_tokenizer):
    ids = small_tokenizer("<ref>cat</ref><box>1</box><|im_end|>")["input_ids"]
    assert small_tokenizer.decode(ids, skip_special_tokens=True) == "<ref>cat</ref><box>1</box>"


def test_assistant_mask_is_the_labels(small_tokenizer):
    """The template marks what the prompt labels: every answer through <|im_end|>, nothing else."""
    messages = [
        {"role": "user", "content": "What is the colour of the shape?"},
        {"role": "assistant", "content": "The answer is blue."},
        {"role": "user", "content": [{"type": "text", "text": "Is there a red circle?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "red"}]},
    ]
    made = small_tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    plain = [
        message | {"content": message["content"] if isinstance(message["content"], str) else message["content"][0]["text"]}
        for message in messages
    ]
    encoded = encode(render(plain), TextEncoder(small_tokenizer))
    assert made["input_ids"] == list(encoded.input_ids)
    assert made["assistant_masks"] == [int(label != IGNORE_INDEX) for label in encoded.labels]


def test_add_eagle_tokens():
    tokenizer = plain_tokenizer()
    assert add_eagle_tokens(tokenizer) == 13
    assert tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>", *EAGLE_TOKENS]) == list(range(256, 269))
    assert add_eagle_tokens(tokenizer) == 0


def test_save_and_load(small_tokenizer, tmp_path):
    small_tokenizer.save_pretrained(tmp_path / "good")
    again = load_tokenizer(tmp_path / "good")
    text = "Frame 12 sample at 3.50s: <box>é</box>\n"
    assert again(text)["input_ids"] == small_tokenizer(text)["input_ids"]
    plain_tokenizer().save_pretrained(tmp_path / "bad")
    with pytest.raises(PromptError, match="add_eagle_tokens"):
        load_tokenizer(tmp_path / "bad")


def test_prompt_needs_no_torch():
    code = "import sys, eagle_model.prompt.costs; assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_public_names():
    import eagle_model

    for name in eagle_model.__all__:
        assert getattr(eagle_model, name) is not None
    with pytest.raises(AttributeError, match="nothing"):
        _ = eagle_model.nothing
