"""Names of the operators, the choice between their implementations, and their registration with `torch.library`.

Triton kernels run on NVIDIA GPUs of compute capability 8.0 or newer; the plain-torch reference runs everywhere else and for float64.
"""

import contextlib
import functools
import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

IMPLEMENTATIONS = ("triton", "torch")
TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
HAS_TRITON = importlib.util.find_spec("triton") is not None

OPERATORS: list[str] = []  # every folder of `eagle_kernels.ops` adds its names with `declare`

_forced: str | None = None  # a plain global: torch.compile guards on it, and cannot trace a context variable

# `torch.library.custom_op` would cost tens of microseconds of CPU time per call; an operator of a `Library` costs a few.
_library = torch.library.Library("eagle_kernels", "DEF")


def declare(*names: str) -> None:
    """Add operators to the names that `implementation` knows."""
    OPERATORS.extend(names)


@functools.cache
def _capable(index: int) -> bool:
    return torch.version.hip is None and torch.cuda.get_device_capability(index) >= (8, 0)


def _choose(device: torch.device, dtype: torch.dtype) -> str:
    if dtype not in TRITON_DTYPES:
        return "torch"
    if _forced is not None:
        return _forced
    if device.type != "cuda" or not HAS_TRITON:
        return "torch"
    if torch.compiler.is_compiling():
        return "triton"  # a graph that is compiled for the device can run there, and a query of the driver cannot be traced
    return "triton" if _capable(device.index if device.index is not None else torch.cuda.current_device()) else "torch"


def implementation(name: str, device: torch.device | str | None = None, dtype: torch.dtype = torch.bfloat16) -> str:
    """The implementation that operator `name` uses for tensors of `dtype` on `device`: "triton" or "torch".

    device: default: the current GPU if there is one, else the CPU. Raises ValueError for an unknown name.

    Some arguments take the torch implementation on a GPU too: rows wider than 65536 in `rms_norm` and `add_rms_norm`; `gelu_linear` with
    gradients, without a bias or with `approximate="none"`.
    """
    if name not in OPERATORS:
        raise ValueError(f"implementation: {name!r} is not an operator; expected one of {', '.join(OPERATORS)}")
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return _choose(torch.device(device), dtype)


def use_triton(tensor: Tensor) -> bool:
    """Whether operators run their Triton kernels for `tensor`."""
    if _forced is None and not tensor.is_cuda:
        return False
    return _choose(tensor.device, tensor.dtype) == "triton"


@contextlib.contextmanager
def use_implementation(choice: str) -> Iterator[None]:
    """Within the block, every operator uses `choice` ("triton" or "torch") on every device; float64 always uses "torch".

    For comparisons and for Triton's interpreter. Raises ValueError for any other choice.
    """
    if choice not in IMPLEMENTATIONS:
        raise ValueError(f"use_implementation: {choice!r} is not an implementation; expected one of {', '.join(IMPLEMENTATIONS)}")
    global _forced
    before, _forced = _forced, choice
    try:
        yield
    finally:
        _forced = before


def register(schema: str, kernel: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Define `torch.ops.eagle_kernels.<name>` from a schema "name(...) -> ...", so that `torch.compile` sees one opaque node.

    kernel: runs on CUDA tensors (and on CPU tensors in Triton's interpreter); fake: returns tensors of the result's shapes and dtypes.
    """
    name = schema.split("(", 1)[0]
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))

    def run(*args: Any) -> Any:
        device = next(argument.device for argument in args if isinstance(argument, torch.Tensor))
        if device.type == "cuda":
            with torch.cuda.device(device):
                return kernel(*args)
        return kernel(*args)

    _library.impl(name, run, "CUDA")
    _library.impl(name, run, "CPU")
    torch.library.register_fake(f"eagle_kernels::{name}", fake, lib=_library)
