"""Tokenizers for Eagle: load one, give a language model's tokenizer the Eagle tokens, or train a small one.

Ids are never constants: they differ between checkpoints and are always read from the tokenizer.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from eagle_model.prompt import DEFAULT_SYSTEM, EAGLE_TOKENS, GROUNDING_TOKENS, IM_END, IM_START, STRUCTURAL_TOKENS, PromptError

END_OF_TEXT = "<|endoftext|>"

# Qwen2's split: words with the space before them, digits one by one, runs of signs, line ends, other space.
_SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"

#: ChatML for callers that render messages with the tokenizer alone; Eagle itself uses `eagle_model.prompt`. The generation markers let
#: transformers and TRL mask everything except answers, `<|im_end|>` included.
CHAT_TEMPLATE = (
    "{% set media = namespace(image=0, video=0) %}"
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}" + IM_START + "system\n" + DEFAULT_SYSTEM + IM_END + "\n{% endif %}"
    "{% set body = namespace(text='') %}"
    "{% if message['content'] is string %}{% set body.text = message['content'] %}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] in ('image', 'image_url') %}"
    "{% set media.image = media.image + 1 %}{% set body.text = body.text ~ '<image-' ~ media.image ~ '>' %}"
    "{% elif part['type'] == 'video' %}"
    "{% set media.video = media.video + 1 %}{% set body.text = body.text ~ '<video-' ~ media.video ~ '>' %}"
    "{% elif 'text' in part %}{% set body.text = body.text ~ part['text'] %}{% endif %}"
    "{% endfor %}{% endif %}"
    "{{ '" + IM_START + "' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ body.text + '" + IM_END + "' }}{% endgeneration %}"
    "{% else %}{{ body.text + '" + IM_END + "' }}{% endif %}"
    "{{ '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '" + IM_START + "assistant\n' }}{% endif %}"
)


def add_eagle_tokens(tokenizer: Any) -> int:
    """Add the tokens of Eagle to a transformers tokenizer (ChatML and `EAGLE_TOKENS`, in that order); returns the number of new tokens.

    Grounding markup is added as ordinary text tokens, so that decoding keeps it; the rest is special.
    """
    wanted = [AddedToken(token, special=token not in GROUNDING_TOKENS, normalized=False) for token in (IM_START, IM_END, *EAGLE_TOKENS)]
    known = tokenizer.get_vocab()
    return sum(tokenizer.add_tokens([token], special_tokens=token.special) for token in wanted if token.content not in known)


def check_tokenizer(tokenizer: Any) -> Any:
    """The tokenizer itself; PromptError when it lacks a token that every prompt needs."""
    known = tokenizer.get_vocab()
    missing = [token for token in STRUCTURAL_TOKENS if token not in known]
    if missing:
        raise PromptError(f"the tokenizer lacks {', '.join(missing)}; add them with eagle_model.tokenizer.add_eagle_tokens")
    return tokenizer


def load_tokenizer(folder: str | Path, *, add_tokens: bool = False, **options: Any) -> Any:
    """The tokenizer of a checkpoint folder (or hub name, with transformers' `options`). A folder with tokenizer.json needs no torch.

    folder may be a GGUF file. add_tokens: for the tokenizer of a language model: add Eagle's tokens where they are missing, and replace its
    chat template by Eagle's, the format that the model is trained on.
    Raises PromptError when the tokenizer lacks Eagle's tokens, and OSError when there is none.
    """
    path = Path(folder)
    if (path / "tokenizer.json").is_file():
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, **options)
    else:
        from transformers import AutoTokenizer

        if path.suffix == ".gguf":
            folder, options = path.parent, options | {"gguf_file": path.name}
        tokenizer = AutoTokenizer.from_pretrained(folder, **options)
    if add_tokens:
        add_eagle_tokens(tokenizer)
        tokenizer.chat_template = CHAT_TEMPLATE
    return check_tokenizer(tokenizer)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE of at most `vocab_size` tokens, with ChatML's and Eagle's tokens last; digits stay single.

    It encodes any text, since the 256 bytes are always in it. Raises ValueError when `vocab_size` is too small for them.
    """
    special = (END_OF_TEXT, IM_START, IM_END, *EAGLE_TOKENS)
    if vocab_size < 256 + len(special):
        raise ValueError(f"vocab_size is {vocab_size}; 256 bytes and {len(special)} special tokens need {256 + len(special)}")
    backend = Tokenizer(models.BPE())
    backend.normalizer = normalizers.NFC()  # type: ignore[assignment]
    backend.pre_tokenizer = pre_tokenizers.Sequence(  # type: ignore[assignment]
        [pre_tokenizers.Split(Regex(_SPLIT), behavior="isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    backend.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(special),  # type: ignore[call-arg]
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special[:6]])
    backend.add_tokens([AddedToken(token, special=False, normalized=False) for token in special[6:]])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=IM_END,
        pad_token=END_OF_TEXT,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )
