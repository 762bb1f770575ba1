"""Weights by rows: where the rows of a tensor come from, so that a rank reads or draws its own part of a model and nothing else.

A `Rows` describes one tensor without holding it. `fill` copies the rows that a parameter holds on this rank (all of them, or the shard
of a DTensor) into it, block by block.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from transformers.models.siglip.modeling_siglip import SiglipVisionEmbeddings

from eagle_model.quantized import quantized_layers

BLOCK_ELEMENTS = 1 << 22
"""Elements that are copied at a time: with 16 threads at most 512 MiB of host memory."""
THREADS = 16


@dataclass(frozen=True)
class Rows:
    """A tensor of `shape`, whose rows (along dimension 0) `read(start, stop)` returns on the CPU, in any floating dtype.

    unit: rows that are made together, from multiples of it on: reading some of them costs as much as reading all.
    """

    shape: tuple[int, ...]
    read: Callable[[int, int], Tensor]
    unit: int = 1


def of_tensor(tensor: Tensor) -> Rows:
    """The rows of a tensor in memory."""
    return Rows(tuple(tensor.shape), lambda start, stop: tensor[start:stop])


def of_files(files: Mapping[str, Path]) -> dict[str, Rows]:
    """The tensors of safetensors files; files: the file of every tensor. Shapes are read from the files' headers, data when it is asked
    for. A file stays open (mapped, not in memory) as long as one of its tensors is referenced."""
    opened: dict[Path, Any] = {}
    result = {}
    for name, path in files.items():
        if path not in opened:
            opened[path] = safe_open(path, framework="pt", device="cpu")
        result[name] = _of_slice(opened[path].get_slice(name))
    return result


def _of_slice(part: Any) -> Rows:
    shape = tuple(part.get_shape())
    return Rows(shape, lambda start, stop: part[start:stop] if shape else part[...])


def transformed(rows: Rows, shape: tuple[int, ...], change: Callable[[Tensor], Tensor]) -> Rows:
    """The rows of `change(whole tensor)`, of `shape`: for small tensors, since every reader reads the whole one."""
    whole = cache(lambda: change(rows.read(0, rows.shape[0])))
    return Rows(shape, lambda start, stop: whole()[start:stop])


def grown(rows: Rows, size: int) -> Rows:
    """The same with `size` rows. New rows are the mean of the old ones (summed in float64): a token that the model has not seen."""
    old, *rest = rows.shape
    mean = cache(lambda: _mean(rows))

    def read(start: int, stop: int) -> Tensor:
        below = rows.read(min(start, old), min(stop, old))
        new = max(0, stop - max(start, old))
        return torch.cat([below, mean().to(below.dtype).expand(new, *rest)]) if new else below

    return Rows((size, *rest), read)


def same_rows(a: Rows, b: Rows, dtype: torch.dtype) -> bool:
    """Whether two tensors of one shape are equal in `dtype`, compared block by block."""
    blocks = _blocks(0, a.shape[0], a.shape)
    return all(torch.equal(a.read(start, stop).to(dtype), b.read(start, stop).to(dtype)) for start, stop in blocks)


def _mean(rows: Rows) -> Tensor:
    count = rows.shape[0]
    total = torch.zeros(rows.shape[1:], dtype=torch.float64)
    for start, stop in _blocks(0, count, rows.shape):
        total += rows.read(start, stop).double().sum(0)
    return total / count


def _blocks(start: int, stop: int, shape: tuple[int, ...], unit: int = 1) -> Iterator[tuple[int, int]]:
    """Parts of rows [start, stop) of BLOCK_ELEMENTS, or one unit, at most; borders between them are multiples of the unit."""
    width = max(1, torch.Size(shape[1:]).numel())
    step = max(1, BLOCK_ELEMENTS // width // unit) * unit
    while start < stop:
        end = min(stop, (start // unit) * unit + step)
        yield start, end
        start = end


def local_rows(parameter: Tensor) -> tuple[Tensor, int]:
    """What this rank holds of a parameter, and the number of the first of these rows in the whole tensor.

    Raises ValueError for a tensor that is sharded along another dimension than 0.
    """
    if not isinstance(parameter, DTensor):
        return parameter, 0
    if any(isinstance(placement, Shard) and placement.dim != 0 for placement in parameter.placements):
        raise ValueError(f"a parameter is sharded as {parameter.placements}; only shards of dimension 0 are filled by rows")
    _, offset = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
    return parameter.to_local(), offset[0]


@torch.no_grad()
def fill(model: nn.Module, rows: Mapping[str, Rows], *, threads: int | None = None) -> None:
    """Fill every parameter of a model (plain or sharded) from `rows`, by name; of tied parameters the first name counts. Weights of
    layers in 4 bits are rounded on every rank.

    Host memory: a few blocks of `BLOCK_ELEMENTS`. threads: that read or draw at once (default: the CPUs of this host over its ranks, at
    most 16). Raises ValueError for a parameter without rows or of another shape, before anything is read.
    """
    work = []
    rounded = {f"{name}.weight": layer for name, layer in quantized_layers(model).items()}
    shapes = {name: (layer.out_features, layer.in_features) for name, layer in rounded.items()}
    shapes |= {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    for name, shape in shapes.items():
        if name not in rows or rows[name].shape != shape:
            found = rows[name].shape if name in rows else "nothing"
            raise ValueError(f"{name} is {shape}, but there is {found} to fill it with")
    for name, parameter in model.named_parameters():
        local, first = local_rows(parameter)
        if not local.ndim:
            work.append((local, rows[name], 0, 1))
            continue
        for start, stop in _blocks(first, first + local.shape[0], rows[name].shape, rows[name].unit):
            work.append((local[start - first : stop - first], rows[name], start, stop))
    count = threads or max(1, min(THREADS, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
    if count == 1:
        for item in work:
            _copy(item)
    else:
        with ThreadPoolExecutor(count) as pool:
            for _ in pool.map(_copy, work):
                pass
    for name, layer in rounded.items():
        layer.fill(rows[name].read(0, layer.out_features))
    fill_buffers(model)


@torch.no_grad()
def _copy(item: tuple[Tensor, Rows, int, int]) -> None:
    target, rows, start, stop = item
    target.copy_(rows.read(start, stop))


def fill_buffers(model: nn.Module) -> None:
    """Give the buffers of a model that was built on the meta device their values: they follow from its configuration."""
    for module in model.modules():
        if isinstance(module, SiglipVisionEmbeddings):
            ids: Any = module.position_ids
            ids.copy_(torch.arange(ids.shape[-1]).expand((1, -1)))
