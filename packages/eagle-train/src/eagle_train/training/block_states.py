"""Reads optimizer states of 8 bits into other shards than those that wrote them.

A state is quantised in blocks of consecutive elements of a rank's shard, or stays in float32 where the shard is small or no multiple of a
block. Other ranks have other shards: some then cut a block, and some are kept in the other form. Such a state goes through float32; one
that lies as it did is read as it is, bit for bit.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, ReadItem


class BlockStates(DefaultLoadPlanner):
    """A plan to read the states `names` of all parameters. block: elements of a block. quantised(elements): whether a shard of so many
    elements is kept in blocks."""

    def __init__(self, names: Sequence[str], block: int, quantised: Callable[[int], bool]) -> None:
        super().__init__()
        self._names, self._block, self._quantised = tuple(f".{name}" for name in names), block, quantised
        #: What is read as float32, by where it goes and where it is, with what of it is wanted.
        self._parts: dict[tuple[MetadataIndex, MetadataIndex], ReadItem] = {}
        #: Shards in blocks that are put together from parts, and how many are still missing.
        self._wholes: dict[MetadataIndex, Tensor] = {}
        self._missing: Counter[MetadataIndex] = Counter()

    def create_local_plan(self) -> LoadPlan:
        plan = super().create_local_plan()
        # A shard in blocks is quantised once, from all of its parts.
        through = {item.dest_index for item in plan.items if self._is_state(item) and not self._lies_as_it_did(item)}
        return replace(plan, items=[self._as_float32(item) if item.dest_index in through else item for item in plan.items])

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        if self._key(read_item) in self._parts:
            return torch.empty(read_item.lengths, dtype=torch.float32)
        return super().resolve_tensor(read_item)

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        wanted = self._parts.get(self._key(read_item))
        if wanted is None:
            return super().commit_tensor(read_item, tensor)
        if wanted != read_item:
            tensor = _narrowed(tensor, wanted.storage_offsets, wanted.lengths)
        index, target = wanted.dest_index, self.lookup_tensor(wanted.dest_index)
        if not _in_blocks(target):
            _narrowed(target, wanted.dest_offsets, wanted.lengths).copy_(tensor)
            return None
        if index not in self._wholes:
            self._wholes[index] = torch.empty(target.shape, dtype=torch.float32)
        _narrowed(self._wholes[index], wanted.dest_offsets, wanted.lengths).copy_(tensor)
        self._missing[index] -= 1
        if not self._missing[index]:
            target.copy_(self._wholes.pop(index).to(target.device))  # its tables are on that device
        return None

    def _as_float32(self, item: ReadItem) -> ReadItem:
        """The item that is read in its place: a shard in blocks as a whole, where the item cuts one."""
        shape = self._saved_shape(item)
        whole = self._quantised(math.prod(shape)) and not self._at_edges(item.storage_offsets, item.lengths, shape)
        read = replace(item, storage_offsets=torch.Size([0] * len(shape)), lengths=shape) if whole else item
        self._parts[self._key(read)] = item
        self._missing[item.dest_index] += 1
        return read

    def _lies_as_it_did(self, item: ReadItem) -> bool:
        shape, target = self._saved_shape(item), self.lookup_tensor(item.dest_index)
        if not self._quantised(math.prod(shape)):
            return not _in_blocks(target)
        edges = ((item.storage_offsets, shape), (item.dest_offsets, target.shape))
        return _in_blocks(target) and all(self._at_edges(offsets, item.lengths, size) for offsets, size in edges)

    def _at_edges(self, offsets: Sequence[int], lengths: Sequence[int], shape: Sequence[int]) -> bool:
        """Whether these rows of a shard begin and end where blocks do."""
        width = math.prod(shape[1:])
        return not (offsets[0] * width % self._block or (offsets[0] + lengths[0]) * width % self._block)

    def _is_state(self, item: ReadItem) -> bool:
        return item.type == LoadItemType.TENSOR and item.dest_index.fqn.endswith(self._names) and len(item.lengths) > 0

    def _saved_shape(self, item: ReadItem) -> torch.Size:
        """Of the shard in the checkpoint."""
        assert self.metadata is not None
        saved: Any = self.metadata.state_dict_metadata[item.storage_index.fqn]
        assert isinstance(saved, TensorStorageMetadata)
        return next(chunk.sizes for chunk in saved.chunks if chunk.offsets == item.storage_index.offset)

    @staticmethod
    def _key(item: ReadItem) -> tuple[MetadataIndex, MetadataIndex]:
        return item.dest_index, item.storage_index


def _in_blocks(tensor: Tensor) -> bool:
    return hasattr(tensor, "codes")  # torchao's


def _narrowed(tensor: Tensor, offsets: Sequence[int], lengths: Sequence[int]) -> Tensor:
    for dimension, (offset, length) in enumerate(zip(offsets, lengths, strict=True)):
        if length != tensor.shape[dimension]:
            tensor = tensor.narrow(dimension, offset, length)
    return tensor
