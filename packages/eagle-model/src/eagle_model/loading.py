"""A model from its folder, for answering: built without memory, its tensors read to the device and dtype of their use."""

from pathlib import Path

import torch
from transformers import GenerationConfig
from transformers.initialization import no_init_weights

from eagle_model.checkpoint import checkpoint_rows
from eagle_model.configuration import EagleConfig
from eagle_model.eagle import EagleForConditionalGeneration
from eagle_model.weights import fill


def load_model(folder: str | Path, *, device: torch.device, dtype: torch.dtype) -> EagleForConditionalGeneration:
    """What `EagleForConditionalGeneration.from_pretrained(folder, dtype=dtype).to(device).eval()` gives; weights need no gradient.

    No copy in another dtype and none on the host is made: blocks of rows go from the file to the device. Raises FileNotFoundError without
    weights, and ValueError naming tensors that are missing, unknown or of another shape.
    """
    folder = Path(folder)
    config = EagleConfig.from_pretrained(folder)
    config.dtype = dtype
    with torch.device("meta"), no_init_weights():
        model = EagleForConditionalGeneration(config)
    model.tie_weights()
    model.to(dtype)  # type: ignore[arg-type]
    rows = checkpoint_rows(model, folder)
    model.to_empty(device=device)
    model.tie_weights()  # each module got a parameter of its own
    fill(model, rows)
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model.requires_grad_(False).eval()
