"""The one place that picks an implementation: Triton kernels on NVIDIA GPUs, the plain-torch reference everywhere else."""

import contextlib
import functools
import importlib.util
from collections.abc import Iterator

import torch
from torch import Tensor

OPERATORS = ("rms_norm", "add_rms_norm", "rope", "swiglu", "swiglu_mlp", "gelu_linear", "linear_cross_entropy")
IMPLEMENTATIONS = ("triton", "torch")
TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_forced: str | None = None  # a plain global, because torch.compile guards on those and can't trace a context variable


HAS_TRITON = importlib.util.find_spec("triton") is not None


@functools.cache
def _capable(index: int) -> bool:
    return torch.version.hip is None and torch.cuda.get_device_capability(index) >= (8, 0)


def implementation(name: str, device: torch.device | str | None = None, dtype: torch.dtype = torch.bfloat16) -> str:
    """Which implementation of operator `name` would run on tensors of `dtype` on `device`: "triton" or "torch".

    Without a device: the GPU if there is one, else the CPU. Raises ValueError for a name that is no operator.
    """
    if name not in OPERATORS:
        raise ValueError(f"implementation: no operator is called {name!r}; they are {', '.join(OPERATORS)}")
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(device)
    if dtype not in TRITON_DTYPES:
        return "torch"
    if _forced is not None:
        return _forced
    if device.type != "cuda" or not HAS_TRITON:
        return "torch"
    if torch.compiler.is_compiling():
        return "triton"  # what compiles for the device can run there, and asking the driver can't be traced
    return "triton" if _capable(device.index if device.index is not None else torch.cuda.current_device()) else "torch"


def use_triton(name: str, tensor: Tensor) -> bool:
    """Whether operator `name` runs its Triton kernels for `tensor`."""
    if _forced is None and not tensor.is_cuda:
        return False
    return implementation(name, tensor.device, tensor.dtype) == "triton"


@contextlib.contextmanager
def use_implementation(choice: str) -> Iterator[None]:
    """Within the block operators run `choice` ("triton" or "torch") on any device; float64 always runs "torch".

    For comparisons, and for Triton's interpreter. Raises ValueError for any other choice.
    """
    if choice not in IMPLEMENTATIONS:
        raise ValueError(f"use_implementation: {choice!r} is no implementation; they are {', '.join(IMPLEMENTATIONS)}")
    global _forced
    before, _forced = _forced, choice
    try:
        yield
    finally:
        _forced = before
