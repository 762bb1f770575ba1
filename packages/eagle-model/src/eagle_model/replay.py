"""The decode step as a CUDA graph: one launch a token, without a compiler.

With one row of 2K tokens a step of the 8B takes 21.2 ms on an H200 when its kernels are started from Python, 5.8 ms as a graph, and 9.0 ms
with `torch.compile`, which takes 15 s to begin (2026-11-28, `benchmarks/generation.py`). `generate` takes this with a cache of fixed size
and `CompileConfig(backend="cudagraphs")`.
"""

import logging
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from eagle_model.padded import EagleOutput

logger = logging.getLogger(__name__)

#: Returns the output of a call and a function that computes it again, from new values in the same arguments.
Recorder = Callable[[Callable[[], EagleOutput]], tuple[EagleOutput, Callable[[], None]]]


def record_graph(call: Callable[[], EagleOutput]) -> tuple[EagleOutput, Callable[[], None]]:
    """`Recorder` of a CUDA graph. Nothing is computed yet. Raises RuntimeError on a device without graphs, and for a call that waits."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        output = call()
    return output, graph.replay


class ReplayedSteps:
    """Calls of a model for one new token in each row. The first runs as it is, the second is recorded, and it and all later are replayed.

    A call with other shapes or another cache starts anew. What cannot be replayed (several new tokens, hidden states) runs as it is, and
    after a failed recording, with a warning, every call does. Made for one `generate`: it holds the graph's memory.
    """

    def __init__(self, model: Callable[..., Any], record: Recorder = record_graph) -> None:
        self.model, self.record = model, record
        self._key: Any = None
        self._buffers: dict[str, Tensor] = {}
        self._output: EagleOutput | None = None
        self._replay: Callable[[], None] | None = None

    def __call__(self, **inputs: Any) -> Any:
        tensors = {name: value for name, value in inputs.items() if isinstance(value, Tensor)}
        ids, mask = tensors.get("input_ids"), tensors.get("attention_mask")
        known = ids is not None and ids.shape[1] == 1 and mask is not None and mask.ndim == 4 and "pixel_values" not in tensors
        if self.record is None or not known or inputs.get("output_hidden_states") or not inputs.get("return_dict"):
            return self.model(**inputs)
        others = {name: value for name, value in inputs.items() if name not in tensors}
        cache = others.pop("cache", None) or others.pop("past_key_values", None)
        shapes = {name: (value.shape, value.dtype, value.device) for name, value in tensors.items()}
        key = (None if cache is None else weakref.ref(cache), shapes, others)
        if self._key != key:
            self._key, self._output, self._replay = key, None, None
            return self.model(**inputs)
        if self._replay is None:
            self._buffers = {name: value.clone() for name, value in tensors.items()}
            try:
                self._output, self._replay = self.record(lambda: self.model(**inputs | self._buffers))
            except RuntimeError as error:
                logger.warning("decoding without a CUDA graph: recording it failed with %s", error)
                self.record = None  # type: ignore[assignment]
                return self.model(**inputs)
        for name, value in tensors.items():
            self._buffers[name].copy_(value)
        self._replay()
        output = self._output
        assert output is not None
        assert output.logits is not None
        return replace(output, logits=output.logits.clone(), last_hidden_state=None)
