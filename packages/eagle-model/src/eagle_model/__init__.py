"""The Eagle 2.5 vision-language model: configuration, processor, modelling, generation, checkpoints.

Modules that need torch are loaded at first use: the prompt, its costs and the visual pipeline work without torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from eagle_model.batch import PackedBatch
from eagle_model.errors import ModelError
from eagle_model.prompt import Encoded, PromptError, Special, Text, VideoSpan, VisualTokens, encode, render, to_text
from eagle_model.prompt.costs import PromptCosts
from eagle_model.visual import BudgetError, SamplePlan, VideoRef, VisualSpec

if TYPE_CHECKING:
    from eagle_model.configuration import EagleConfig
    from eagle_model.eagle import EagleForConditionalGeneration
    from eagle_model.padded import EagleOutput
    from eagle_model.presets import PRESETS, preset
    from eagle_model.pretrained import from_pretrained_parts
    from eagle_model.processor import EagleProcessor

__version__ = "0.1.0"

_HOMES = {
    "PRESETS": "presets",
    "EagleConfig": "configuration",
    "EagleForConditionalGeneration": "eagle",
    "EagleOutput": "padded",
    "EagleProcessor": "processor",
    "from_pretrained_parts": "pretrained",
    "preset": "presets",
}

__all__ = [
    "PRESETS",
    "BudgetError",
    "EagleConfig",
    "EagleForConditionalGeneration",
    "EagleOutput",
    "EagleProcessor",
    "Encoded",
    "ModelError",
    "PackedBatch",
    "PromptCosts",
    "PromptError",
    "SamplePlan",
    "Special",
    "Text",
    "VideoRef",
    "VideoSpan",
    "VisualSpec",
    "VisualTokens",
    "encode",
    "from_pretrained_parts",
    "preset",
    "register",
    "render",
    "to_text",
]


def register() -> None:
    """Make transformers' `AutoConfig`, `AutoModelForImageTextToText` and `AutoProcessor` know `eagle_2_5_vl`.

    Using any class of this package does the same; call it when only the Auto classes are used.
    """
    for module in ("configuration", "eagle", "processor"):
        import_module(f"eagle_model.{module}")


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'eagle_model' has no attribute {name!r}")
    return getattr(import_module(f"eagle_model.{_HOMES[name]}"), name)
