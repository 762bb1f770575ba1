"""A tokenizer for the small models: runs of up to three digits are one token, as in Llama 3, and so are the words around a frame.

A frame costs 9 tokens of text then, instead of 18 with the quickstart's tokenizer, so that 512 frames of one visual token fit 5.5K tokens.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from eagle_model.tokenizer import CHAT_TEMPLATE, add_eagle_tokens

SPLIT = r"Frame | sample at |s: |\p{N}{1,3}| ?\p{L}+|\s+|[^\s\p{L}\p{N}]"
WORDS = 320


def make_tokenizer(texts: Iterable[str], folder: Path) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE on `texts` and on all numbers of up to three digits; save it to `folder` and return it."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(  # type: ignore[assignment]
        [pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    backend.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    numbers = [f"{number:0{digits}d}" for digits in (2, 3) for number in range(10**digits)]
    frames = "Frame 1 sample at 2.50s: Frame 10 sample at 2.25s: Frame 100 sample at 24.75s: "
    fixed = "system\nYou are a helpful assistant.\nuser\nassistant\n<image 1>The first video sampled with 2.00 fps: "
    trainer = trainers.BpeTrainer(
        vocab_size=256 + 1100 + WORDS,  # type: ignore[call-arg]
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    # Numbers come often enough that every one of them becomes a token before rare words do.
    backend.train_from_iterator([*texts, *[" ".join(numbers)] * 2000, *[frames + fixed] * 5000], trainer)
    backend.add_special_tokens([AddedToken("<|endoftext|>", special=True, normalized=False)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>", padding_side="left", chat_template=CHAT_TEMPLATE
    )
    add_eagle_tokens(tokenizer)
    tokenizer.save_pretrained(folder)
    return tokenizer
