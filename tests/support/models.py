"""Small tokenizers and models for tests."""

import functools

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from eagle_model import EagleForConditionalGeneration, EagleProcessor, preset
from eagle_model.prompt import EAGLE_TOKENS
from eagle_model.tokenizer import train_tokenizer

TEXTS = ["What is the colour of the shape?", "Is there a red circle in the image?", "The answer is blue.", "Frame 1 sample at 2.50s: "]
VISION = {"image_size": 32, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_hidden_layers": 3}
TEXT = {
    "vocab_size": 120,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.1,
}


@functools.cache
def small_tokenizer(vocabulary: int = 400) -> PreTrainedTokenizerFast:
    """Trained on a few sentences. The same object each time: do not change it."""
    return train_tokenizer(TEXTS * 8, vocabulary)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, and the special tokens of ChatML and Eagle."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={character: index for index, character in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(
        [AddedToken(token, special=True) for token in ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *EAGLE_TOKENS)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>")


def tiny_config(tokenizer=None, **changes):
    """A model of a few thousand parameters: 32-pixel tiles of 8-pixel patches, 4 tokens a tile. Without a tokenizer, token 100 is that of
    images."""
    for name, default in (("vision_config", VISION), ("text_config", TEXT)):
        changes[name] = default | changes.get(name, {})
    if tokenizer is not None:
        changes["text_config"].pop("vocab_size", None)
    else:
        changes.setdefault("image_token_index", 100)
    return preset("tiny", tokenizer=tokenizer, **changes)


def tiny_model(config=None, *, seed=0, **changes) -> EagleForConditionalGeneration:
    """The model of `config` (default: `tiny_config(**changes)`) with random weights, in eval mode."""
    torch.manual_seed(seed)
    return EagleForConditionalGeneration(config if config is not None else tiny_config(**changes)).eval()


def save_tiny_model(folder):
    """Write the tiny model with a tokenizer of 320 tokens and its processor to `folder`, which is returned."""
    tokenizer = small_tokenizer(320)
    model = tiny_model(tokenizer=tokenizer)
    model.save_pretrained(folder)
    EagleProcessor.for_config(tokenizer, model.config, min_frames=2, max_tokens=2000).save_pretrained(folder)
    return folder


def loss_and_gradients(model, batch, **options):
    """(loss, gradients by name) of one forward and backward pass; `options` are those of the model's forward."""
    model.zero_grad(set_to_none=True)
    loss = model(batch, **options).loss
    loss.backward()
    return loss.item(), {name: one.grad for name, one in model.named_parameters() if one.grad is not None}


def assert_same_bits(found, expected):
    """Two results of `loss_and_gradients` are equal to the bit."""
    assert found[0] == expected[0]
    assert set(found[1]) == set(expected[1])
    for name, gradient in expected[1].items():
        assert torch.equal(found[1][name], gradient), name
