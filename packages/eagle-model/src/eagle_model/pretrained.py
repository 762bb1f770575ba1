"""A new Eagle from a pretrained vision tower and a pretrained language model; only the connector starts from random weights."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from eagle_model.checkpoint import HEAD, weight_files
from eagle_model.eagle import EagleForConditionalGeneration
from eagle_model.hub import checkpoint_folder
from eagle_model.parts import import_gguf, parts_config
from eagle_model.weights import Rows, fill, grown, of_files, of_tensor, transformed

_POSITIONS = "vision_model.vision_model.embeddings.position_embedding.weight"


def from_pretrained_parts(
    vision: str | Path,
    language: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    image_size: int | None = None,
    dtype: torch.dtype = torch.float32,
    **changes: Any,
) -> EagleForConditionalGeneration:
    """A model of two checkpoints: a SigLIP or SigLIP2 (whole or vision model alone) and a language model of a known family.

    vision, language: folders with `config.json` and safetensors, or names on the Hugging Face hub (`google/siglip2-so400m-patch16-512`),
    which are downloaded unless they are in the cache. The language model can be a GGUF file, which is dequantised.
    tokenizer: the language model's, with Eagle's tokens (`add_eagle_tokens`). The vocabulary grows to it where it must; new rows are the
    mean of the old ones. image_size: tile side in pixels; positions are resized (bicubic) when it is not the tower's own. changes: other
    fields of `EagleConfig`.

    Raises FileNotFoundError for a folder or hub name that is not there or cannot be reached, and ValueError for a model of another kind,
    an unknown change, and tensors that are missing or of another shape.
    """
    vision, language = checkpoint_folder(vision), checkpoint_folder(language)
    model = EagleForConditionalGeneration(parts_config(vision, language, tokenizer, image_size=image_size, **changes))
    model.to(dtype)  # type: ignore[arg-type]
    load_parts(model, vision, language)
    grow_vocabulary(model, len(tokenizer))
    for name in ("eos_token_id", "pad_token_id"):
        setattr(model.generation_config, name, getattr(model.config.text_config, name))
    return model


def grow_vocabulary(model: EagleForConditionalGeneration, size: int) -> None:
    """Give the embedding and the head at least `size` rows; new rows as in `eagle_model.weights.grown`, none on the meta device."""
    old = model.get_input_embeddings().weight.shape[0]  # type: ignore[operator, union-attr]
    if size <= old:  # type: ignore[operator]
        return
    model.resize_token_embeddings(size, mean_resizing=False)
    with torch.no_grad():
        for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
            weight: Any = layer.weight
            if weight.is_meta:
                continue
            weight[old:] = grown(of_tensor(weight[:old]), size).read(old, size)  # type: ignore[arg-type]


def resize_positions(positions: Tensor, count: int) -> Tensor:
    """Position embeddings of a square grid of patches for another square grid: [n, d] -> [count, d], bicubic.

    Raises ValueError when either is not a square.
    """
    if positions.shape[0] == count:
        return positions
    old, new = (round(number**0.5) for number in (positions.shape[0], count))
    if old * old != positions.shape[0] or new * new != count:
        raise ValueError(f"positions of {positions.shape[0]} patches cannot become {count}: both must be squares")
    grid = positions.float().view(1, old, old, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(new, new), mode="bicubic", align_corners=False, antialias=new < old)
    return grid.permute(0, 2, 3, 1).reshape(count, -1).to(positions.dtype)


def load_parts(model: EagleForConditionalGeneration, vision: Path, language: Path) -> None:
    """Copy the tensors of both checkpoints into a model of `parts_config`, whose vocabulary is still the language model's own.

    vision, language: paths that `checkpoint_folder` returns. Raises ValueError for tensors that are missing or of another shape.
    """
    own = {name: of_tensor(parameter.detach()) for name, parameter in model.mlp1.named_parameters(prefix="mlp1")}
    fill(model, own | parts_rows(model, vision, language))


def parts_rows(model: EagleForConditionalGeneration, vision: Path, language: Path) -> dict[str, Rows]:
    """The rows of both checkpoints for the parameters of a model (which may be on the meta device), except those of the connector.

    A GGUF file is read whole into host memory. Raises as `load_parts` does.
    """
    own = dict(model.named_parameters(remove_duplicate=False))
    wanted = {name for name in own if not name.startswith("mlp1.")}
    if model.config.tie_word_embeddings:
        wanted.discard(HEAD)
    result: dict[str, Rows] = {}
    for name, rows in (*_vision_tensors(vision), *_language_tensors(language)):
        if name not in wanted:
            continue
        shape = tuple(own[name].shape)
        if name == _POSITIONS:
            rows = transformed(rows, (shape[0], *rows.shape[1:]), partial(resize_positions, count=shape[0]))
        if rows.shape != shape:
            raise ValueError(f"{name} is {rows.shape}, but the configuration says {shape}")
        result[name] = rows
    left = wanted - set(result)
    if left:
        raise ValueError(f"{len(left)} tensors are in neither {vision} nor {language}: {', '.join(sorted(left)[:4])}, ...")
    return result


def _vision_tensors(folder: Path) -> Iterator[tuple[str, Rows]]:
    for name, rows in of_files(weight_files(folder)).items():
        part = name.rsplit("vision_model.", 1)[-1]
        if part.startswith(("embeddings.", "encoder.", "post_layernorm.")):
            yield f"vision_model.vision_model.{part}", rows


def _language_tensors(folder: Path) -> Iterator[tuple[str, Rows]]:
    """Tensors of a language model under the names that they have in an Eagle; folder: a folder of safetensors, or a GGUF file."""
    if folder.suffix == ".gguf":
        import_gguf(folder)
        state = AutoModelForCausalLM.from_pretrained(folder.parent, gguf_file=folder.name, dtype=torch.float32).state_dict()
        tensors = {name: of_tensor(tensor) for name, tensor in state.items()}
    else:
        tensors = of_files(weight_files(folder))
    for name, rows in tensors.items():
        yield f"language_model.{name}", rows
