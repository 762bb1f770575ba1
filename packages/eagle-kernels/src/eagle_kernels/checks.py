"""Argument checks that operators share. A message names the operator, the argument, its value and what is expected.

No check waits for the device.
"""

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INTEGERS = (torch.int64, torch.int32)


def floating(operator: str, **tensors: Tensor) -> None:
    """All are tensors of one floating dtype on one device. Raises TypeError or ValueError."""
    (first_name, first), *others = tensors.items()
    if not isinstance(first, Tensor):
        raise TypeError(f"{operator}: {first_name} is a {type(first).__name__}, expected a tensor")
    if first.dtype not in FLOATS:
        raise TypeError(f"{operator}: {first_name} is {first.dtype}, expected one of {', '.join(map(str, FLOATS))}")
    for name, tensor in others:
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{operator}: {name} is a {type(tensor).__name__}, expected a tensor")
        if tensor.dtype != first.dtype:
            raise TypeError(f"{operator}: {name} is {tensor.dtype} and {first_name} is {first.dtype}; cast one of them")
        same_device(operator, **{first_name: first, name: tensor})


def same_device(operator: str, **tensors: Tensor) -> None:
    """All are on one device. Raises ValueError."""
    (first_name, first), *others = tensors.items()
    for name, tensor in others:
        if tensor.device != first.device:
            raise ValueError(f"{operator}: {name} is on {tensor.device} and {first_name} on {first.device}; move one of them")


def shape(operator: str, name: str, tensor: Tensor, expected: tuple[int, ...], why: str) -> None:
    """The tensor has exactly the expected shape. Raises ValueError."""
    if tuple(tensor.shape) != expected:
        raise ValueError(f"{operator}: {name} has shape {tuple(tensor.shape)}, expected {expected} ({why})")


def integers(operator: str, name: str, tensor: Tensor) -> None:
    """An int64 or int32 tensor. Raises TypeError."""
    if not isinstance(tensor, Tensor) or tensor.dtype not in INTEGERS:
        raise TypeError(f"{operator}: {name} is {getattr(tensor, 'dtype', type(tensor).__name__)}, expected an int64 or int32 tensor")
