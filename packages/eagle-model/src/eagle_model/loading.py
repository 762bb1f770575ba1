"""A model from its folder, for answering: built without memory, every tensor read once, to the device and in the dtype of its use."""

from pathlib import Path

import torch
from torch import nn
from transformers import GenerationConfig
from transformers.initialization import no_init_weights

from eagle_model.checkpoint import EMBEDDING, HEAD, lacks_head, misfit, read_tensors
from eagle_model.configuration import EagleConfig
from eagle_model.eagle import EagleForConditionalGeneration


def load_model(folder: str | Path, *, device: torch.device, dtype: torch.dtype) -> EagleForConditionalGeneration:
    """What `EagleForConditionalGeneration.from_pretrained(folder, dtype=dtype).to(device).eval()` gives, sooner; weights need no gradient.

    A folder without a head is read as tied, whatever its configuration says. Raises FileNotFoundError without weights, and ValueError
    naming tensors that are missing, unknown or of another shape.
    """
    folder = Path(folder)
    config = EagleConfig.from_pretrained(folder)
    if not config.tie_word_embeddings and lacks_head(folder):
        config.tie()
    config.dtype = dtype
    with torch.device("meta"), no_init_weights():
        model = EagleForConditionalGeneration(config)
    _fill_buffers(model, device)
    tied = bool(config.tie_word_embeddings)
    shapes = {name: parameter.shape for name, parameter in model.named_parameters(remove_duplicate=False)}
    left, wrong = set(shapes), []
    for name, tensor in read_tensors(folder, device=str(device)):
        if name not in shapes:
            wrong.append(f"{name} (unknown)")
            continue
        left.discard(name)
        if shapes[name] != tensor.shape:
            wrong.append(f"{name} (is {tuple(tensor.shape)}, expected {tuple(shapes[name])})")
        elif not (tied and name == HEAD):
            _set(model, name, tensor.to(dtype))
    if tied:
        left.discard(HEAD)
    wrong += [f"{name} (missing)" for name in sorted(left)]
    if wrong:
        raise misfit(folder, wrong)
    if tied:
        model.get_output_embeddings().weight = model.get_parameter(EMBEDDING)  # type: ignore[union-attr]
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model.eval()


def _set(model: nn.Module, name: str, tensor: torch.Tensor) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, nn.Parameter(tensor, requires_grad=False))


def _fill_buffers(model: EagleForConditionalGeneration, device: torch.device) -> None:
    """Buffers are in no file: the model computes them where it draws random weights, which on the meta device draws nothing."""
    for module in model.modules():
        own = {name: buffer for name, buffer in module.named_buffers(recurse=False) if buffer.is_meta}
        for name, buffer in own.items():
            setattr(module, name, torch.empty_like(buffer, device=device))
        if own:
            model._init_weights(module)
