"""Kernels are compiled before the first step: a model of one layer of each kind steps in a thread, while weights and packs are read.

Compiled kernels are kept in files as well (`cli.gpu_settings`); then the thread loads them. Its collectives are none, its numbers are
constants, and it draws no random numbers: training is the same with and without it.
"""

from __future__ import annotations

import copy
import logging
import threading
import time
from typing import Any

import torch
from torch import nn

from eagle_cp import Layout
from eagle_model import PackedBatch
from eagle_train.config import Config

from .build import allocate, on_meta, use_fp8
from .model import attention_backend
from .optim import set_trainable

logger = logging.getLogger(__name__)

TILES, TEXT = 4, 1024
"""Of its pack: enough for the kernels of long packs to be chosen, and done in milliseconds."""


class Warmup:
    """Compiles the kernels of a run's first stage in a thread. `wait` returns when it is over; what fails there fails again, and is
    reported, in the first step."""

    def __init__(self, config: Config, described: Any, device: torch.device) -> None:
        self._thread: threading.Thread | None = None
        try:
            # In the caller's thread: transformers switches initialisation off for the whole process while a model is made without values,
            # and next to this the run's own weights are drawn.
            model = one_layer_model(config, described, device)
        except Exception:
            logger.debug("kernels are not compiled ahead", exc_info=True)
            return
        self._thread = threading.Thread(target=self._run, args=(model, described, device), name="eagle-warmup", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        if self._thread is not None:
            self._thread.join()

    def _run(self, model: Any, described: Any, device: torch.device) -> None:
        begin = time.monotonic()
        try:
            if device.type == "cuda":
                torch.cuda.set_device(device)
            step_once(model, described, device)
        except Exception:
            logger.debug("kernels were not compiled ahead", exc_info=True)
        else:
            logger.debug("kernels are compiled after %.1f s", time.monotonic() - begin)


def step_once(model: Any, described: Any, device: torch.device) -> None:
    """Forward and backward of `one_layer_model`, which gets memory and constants as weights."""
    allocate(model, device)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.01)
    batch = _batch(described, model.tokens_per_tile).to(device)
    model(batch, layout=Layout.single(batch.cu_seqlens)).loss.backward()
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()


def one_layer_model(config: Config, described: Any, device: torch.device) -> Any:
    """The run's model with the first layer of the tower and of the decoder alone, in the dtype of the computation, without memory."""
    small = copy.deepcopy(described)
    text, vision = small.text_config, small.vision_config
    text.num_hidden_layers = vision.num_hidden_layers = 1
    if getattr(text, "layer_types", None) is not None:
        text.layer_types = text.layer_types[:1]
    small.select_layer = -1
    model = on_meta(small)
    use_fp8(config, model)
    nn.Module.to(model, getattr(torch, config.parallel.dtype))
    # Gradients reach adapters through every kernel of the layer that they are added to.
    set_trainable(model, {part: "frozen" if mode == "frozen" else "full" for part, mode in config.stages[0].modes.items()})
    model.attention_backend = attention_backend(config, described, device)
    model.set_activation_checkpointing("recompute")
    return model


def _batch(described: Any, per_tile: int) -> PackedBatch:
    """Two samples: tiles and text, and text alone; every token of the text is a target."""
    visual, size = TILES * per_tile, described.vision_config.image_size
    lengths = (visual + TEXT, TEXT)
    ids = torch.zeros(sum(lengths), dtype=torch.int64)
    ids[:visual] = described.image_token_index
    targets = torch.where(ids == 0, 0, -100)
    edges = (0, lengths[0], sum(lengths))
    return PackedBatch(
        input_ids=ids,
        targets=targets,
        position_ids=Layout.single(edges).position_ids(),
        token_weights=torch.ones(len(ids)),
        cu_seqlens=edges,
        tiles=torch.zeros(TILES, size, size, 3, dtype=torch.uint8),
        visual_index=torch.arange(visual),
        num_kept=2 * TEXT,
        label_weight=2.0 * TEXT,
        denominator=None,
    )
