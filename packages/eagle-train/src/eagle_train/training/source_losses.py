"""The loss of every source of a step, from the losses of single tokens: exact for any packing and any split over ranks.

A step sums `w l` and `w` over the labels of each source; the sums of all ranks travel with the step's loss in one reduction.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from eagle_cp import Layout
from eagle_model.prompt import IGNORE_INDEX
from eagle_train.loading.pack import LoadedPack


class SourceLosses:
    """Sums of one step, float64 [2, sources], on the device: weighted losses (of this rank's tokens), and weights (of whole packs, which
    the first rank of a context group counts). names: of the sources."""

    def __init__(self, names: Sequence[str], device: torch.device) -> None:
        self.names = tuple(names)
        self._index = {name: number for number, name in enumerate(self.names)}
        self.sums = torch.zeros(2, len(self.names), dtype=torch.float64, device=device)

    def add(self, pack: LoadedPack, layout: Layout, losses: Tensor, weights: Tensor, *, count: bool) -> None:
        """Add a pack. losses, weights: [T] of this rank's tokens by `layout`. count: whether this rank counts the weights."""
        batch = pack.batch
        owners = np.repeat([self._index[name] for name in pack.document_sources], np.diff(batch.cu_seqlens)[: len(pack.document_sources)])
        if not len(owners):
            return
        device = self.sums.device
        own = layout.shard(torch.from_numpy(owners.astype(np.int64)))
        self.sums[0].index_add_(0, own.to(device, non_blocking=True), (losses.double() * weights.double()).to(device))
        if count:
            kept = np.asarray(batch.targets) != IGNORE_INDEX
            counted = np.bincount(owners[kept], np.asarray(batch.token_weights, np.float64)[kept], len(self.names))
            self.sums[1] += torch.from_numpy(counted).to(device, non_blocking=True)  # else the host waits for the pack's backward pass


def by_source(names: Sequence[str], sums: Tensor) -> dict[str, float]:
    """Mean loss of each source with a label in the step, from the sums of all ranks, [2, sources]."""
    losses, weights = sums.tolist()
    return {name: loss / weight for name, loss, weight in zip(names, losses, weights) if weight > 0}
