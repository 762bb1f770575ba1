"""Checkpoint folders in the layout of the released models: safetensors (one file or shards with an index) and `config.json`."""

import copy
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from eagle_model.configuration import ARCHITECTURE, EagleConfig
from eagle_model.weights import Rows, fill, of_files, same_rows

HEAD = "language_model.lm_head.weight"
EMBEDDING = "language_model.model.embed_tokens.weight"
#: SigLIP's pooling head: present in released files, never used, never written.
POOLING_HEAD = "vision_model.vision_model.head."
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
CARD = "README.md"
#: Folder in which a checkpoint is written before it is moved to its place.
STAGING = "checkpoint.incomplete"
_SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")


def weight_files(folder: str | Path) -> dict[str, Path]:
    """Name of every tensor in a checkpoint folder, and the file that holds it; a single file comes before an index, as in transformers.

    Raises FileNotFoundError when the folder has no safetensors weights, or an index names a file that is missing.
    """
    folder = Path(folder)
    if (folder / WEIGHTS).is_file():
        with safe_open(folder / WEIGHTS, framework="pt") as file:
            return dict.fromkeys(file.keys(), folder / WEIGHTS)
    if not (folder / INDEX).is_file():
        raise FileNotFoundError(f"{folder} has neither {WEIGHTS} nor {INDEX}; it is not a checkpoint folder")
    names = json.loads((folder / INDEX).read_text())["weight_map"]
    missing = sorted({file for file in names.values() if not (folder / file).is_file()})
    if missing:
        raise FileNotFoundError(f"{folder / INDEX} names {', '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} missing")
    return {name: folder / file for name, file in names.items()}


def lacks_head(folder: str | Path) -> bool:
    """Whether a folder holds a checkpoint without a language head. The head is then the embedding, whatever the configuration says."""
    try:
        return HEAD not in weight_files(folder)
    except FileNotFoundError:
        return False


def read_tensors(folder: str | Path, *, device: str = "cpu") -> Iterator[tuple[str, Tensor]]:
    """Tensors of a checkpoint folder one by one, without the pooling head; each file is opened once."""
    by_file: dict[Path, list[str]] = {}
    for name, path in weight_files(folder).items():
        if not name.startswith(POOLING_HEAD):
            by_file.setdefault(path, []).append(name)
    for path, names in by_file.items():
        with safe_open(path, framework="pt", device=device) as file:
            for name in names:
                yield name, file.get_tensor(name)


def load_checkpoint(model: PreTrainedModel, folder: str | Path) -> None:
    """Copy the tensors of a folder into an Eagle model that exists already, in the model's dtypes; raises ValueError as `checkpoint_rows`
    does."""
    fill(model, checkpoint_rows(model, folder))


def checkpoint_rows(model: PreTrainedModel, folder: str | Path) -> dict[str, Rows]:
    """The rows of a folder's tensors for the parameters of an Eagle model, which may be on the meta device.

    A folder without a head makes the model's head the embedding, as `from_pretrained` does.
    Raises ValueError naming tensors that are missing, unknown or of another shape, and a head that differs from the embedding of a tied
    model.
    """
    own = dict(model.named_parameters(remove_duplicate=False))
    if own[HEAD] is not own[EMBEDDING] and lacks_head(folder):
        model.config.tie()  # type: ignore[union-attr]
        model.tie_weights()
        own[HEAD] = own[EMBEDDING]
    tied = own[HEAD] is own[EMBEDDING]
    found = of_files({name: path for name, path in weight_files(folder).items() if not name.startswith(POOLING_HEAD)})
    wrong: list[str] = []
    for name, rows in found.items():
        if name not in own:
            wrong.append(f"{name} (unknown)")
        elif tuple(own[name].shape) != rows.shape:
            wrong.append(f"{name} (is {rows.shape}, expected {tuple(own[name].shape)})")
    left = set(own) - set(found)
    if tied:
        left.discard(HEAD)
        if not wrong and not left and HEAD in found and not same_rows(found.pop(HEAD), found[EMBEDDING], own[EMBEDDING].dtype):
            wrong.append(f"{HEAD} (is not the embedding, but the configuration ties them; set tie_word_embeddings to false)")
    wrong += [f"{name} (missing)" for name in sorted(left)]
    if wrong:
        raise ValueError(
            f"{folder} does not fit the model: {', '.join(wrong[:8])}{f' and {len(wrong) - 8} more' if len(wrong) > 8 else ''}"
        )
    return found


def save_checkpoint(
    state: Mapping[str, Tensor],
    config: EagleConfig,
    folder: str | Path,
    *,
    max_shard_bytes: int = 5 * 10**9,
    dtype: torch.dtype | None = None,
    end_token_id: int | None = None,
) -> None:
    """Write a state dict and its configuration as a checkpoint folder: `dtype` (default: as the tensors are), shards of at most
    `max_shard_bytes`, no pooling head, and no head when it is tied; `generation_config.json` and, where there is none, a model card.

    end_token_id: the id that ends an answer, of `<|im_end|>` (default: `config.text_config.eos_token_id`).
    A checkpoint that is in the folder already is replaced. The new one is written next to it first, so there must be space for both;
    then the old one goes, and the file that readers look for comes last. However it is interrupted, a folder that can be loaded is
    whole.
    """
    folder = Path(folder)
    staging = folder / STAGING
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    try:
        shards = _write(state, config, staging, max_shard_bytes, dtype, end_token_id)
        if not (folder / CARD).exists():
            (staging / CARD).write_text(model_card(config))
        for path in staging.iterdir():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    for name in (INDEX, WEIGHTS):
        (folder / name).unlink(missing_ok=True)
    for path in sorted(staging.iterdir(), key=lambda path: path.name in (INDEX, WEIGHTS)):
        path.replace(folder / path.name)
    staging.rmdir()
    for path in folder.iterdir():
        if _SHARD.fullmatch(path.name) and path.name not in shards:
            path.unlink()


def finish_folder(folder: str | Path) -> None:
    """Complete what transformers' `save_pretrained` wrote: a model card where there is none, and weights with the mode of the other files.

    safetensors writes weights through a temporary file that only the owner can read, whatever the umask.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():  # not the main process of several
        return
    if not (folder / CARD).exists():
        (folder / CARD).write_text(model_card(EagleConfig.from_pretrained(folder)))
    mode = (folder / "config.json").stat().st_mode
    for path in folder.glob("*.safetensors"):
        path.chmod(mode)


def model_card(config: EagleConfig) -> str:
    """The README.md of a checkpoint folder: what the model consists of, and how it is loaded."""
    text, vision, side = config.text_config, config.vision_config, config.tile_size
    return f"""---
library_name: transformers
pipeline_tag: image-text-to-text
tags:
- eagle
---

# Eagle 2.5 model

A vision-language model of the Eagle 2.5 architecture, in the layout of the released checkpoints.

| part | |
|---|---|
| vision | SigLIP: {vision.num_hidden_layers} layers, width {vision.hidden_size}, tiles of {side} x {side} pixels |
| visual tokens | {config.tokens_per_tile} per tile |
| language | {text.architectures[0]}: {text.num_hidden_layers} layers, width {text.hidden_size}, vocabulary {text.vocab_size} |

## How to load it

The Auto classes of transformers know this architecture once `eagle_model` has registered it:

```python
import eagle_model
from transformers import AutoModelForImageTextToText, AutoProcessor

eagle_model.register()
model = AutoModelForImageTextToText.from_pretrained("PATH")
processor = AutoProcessor.from_pretrained("PATH")
```

`EagleForConditionalGeneration.from_pretrained` and `EagleProcessor.from_pretrained` of `eagle_model` do the same without registering.
No remote code is needed or used.
"""


def save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """`save_file` with the mode that the umask gives a new file; safetensors leaves files that only the owner can read."""
    with open(path, "wb") as file:
        mode = os.fstat(file.fileno()).st_mode
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:  # of the system, which it names without the file
        raise OSError(f"{path}: can't be written: {error}") from error
    path.chmod(mode)


def _write(
    state: Mapping[str, Tensor],
    config: EagleConfig,
    folder: Path,
    max_shard_bytes: int,
    dtype: torch.dtype | None,
    end_token_id: int | None,
) -> set[str]:
    """Write a checkpoint into an empty folder; gives the names of the files with its tensors."""
    tensors = {name: tensor for name, tensor in state.items() if not name.startswith(POOLING_HEAD)}
    if config.tie_word_embeddings:
        tensors.pop(HEAD, None)
    shards: list[list[str]] = [[]]
    room = max_shard_bytes
    total = 0
    for name, tensor in tensors.items():
        size = tensor.numel() * torch.empty((), dtype=dtype or tensor.dtype).element_size()
        if size > room and shards[-1]:
            shards.append([])
            room = max_shard_bytes
        shards[-1].append(name)
        room -= size
        total += size
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file = WEIGHTS if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        part = {name: tensors[name].detach().to("cpu", dtype or tensors[name].dtype).contiguous() for name in names}
        save_tensors(part, folder / file)
        weight_map |= dict.fromkeys(names, file)
    config = copy.deepcopy(config)
    config.dtype = dtype or next(iter(tensors.values())).dtype
    config.architectures = [ARCHITECTURE]
    config.save_pretrained(folder)
    text = config.text_config
    end = text.eos_token_id if end_token_id is None else end_token_id
    GenerationConfig(bos_token_id=text.bos_token_id, eos_token_id=end, pad_token_id=text.pad_token_id).save_pretrained(folder)
    if len(shards) > 1:
        index = json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2, sort_keys=True)
        (folder / INDEX).write_text(index + "\n")
    return set(weight_map.values())
