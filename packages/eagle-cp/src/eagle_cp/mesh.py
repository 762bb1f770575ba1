"""ContextMesh: the ranks that share a sequence, in two levels. Ulysses (all-to-all over heads) inside, all-gather of KV outside.

Rank `(g, u)` of a `gather x ulysses` mesh holds part `u` of the tokens of gather rank `g`. Neighbouring ranks are in one Ulysses group,
which moves more data, so that it stays within a host. The caller builds it and passes it on; nothing is global."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from eagle_cp.collectives import Group
from eagle_cp.watchdog import Watchdog


class ContextMesh:
    """Made by `single()`, `from_device_mesh(...)` or `from_group(...)`.

    `size` = `gather.size * ulysses.size`; `rank` counts gather-major. `device` is where small metadata of a check travels.
    """

    def __init__(self, ulysses: Group, gather: Group, context: Group, device: torch.device):
        if ulysses.size * gather.size != context.size:
            raise ValueError(f"context mesh: {gather.size} gather x {ulysses.size} ulysses ranks, but the whole group has {context.size}")
        self.ulysses, self.gather, self.context, self.device = ulysses, gather, context, device
        self.size = context.size
        self.rank = gather.rank * ulysses.size + ulysses.rank
        self.gather_gb_s = (
            200.0  # what an all-gather moves out of a rank per second: decides whether it is worth overlapping (236 on NVLink 4)
        )
        self.watchdog: Watchdog | None = None

    @classmethod
    def single(cls) -> ContextMesh:
        """A group of one: everything is the identity, nothing is communicated."""
        return cls(Group("ulysses", None), Group("gather", None), Group("context", None), torch.device("cpu"))

    @classmethod
    def from_device_mesh(cls, mesh: DeviceMesh, *, ulysses: int | None = None) -> ContextMesh:
        """From a 2-D mesh `(gather, ulysses)`, or a 1-D mesh of the whole context group with the size of the Ulysses level (default 1).

        Collective over the mesh's ranks. Raises ValueError when `ulysses` doesn't divide the group, or ranks don't ascend row by row.
        """
        if mesh.ndim == 1:
            return cls.from_group(mesh.get_group(), ulysses=ulysses or 1)
        if mesh.ndim != 2:
            raise ValueError(
                f"context mesh: expected a mesh of 1 or 2 dimensions (gather, ulysses), got {mesh.ndim}; pass a sub-mesh such as mesh['cp']"
            )
        if ulysses is not None and ulysses != mesh.size(1):
            raise ValueError(f"context mesh: ulysses={ulysses}, but the mesh's second dimension has {mesh.size(1)} ranks")
        _check_ascending(mesh.mesh.tolist(), mesh.mesh.flatten().tolist())
        whole = _new_group(mesh.mesh.flatten().tolist())
        return cls(*_groups(mesh.get_group(1), mesh.get_group(0), whole))

    @classmethod
    def from_group(cls, group: dist.ProcessGroup | None = None, *, ulysses: int = 1) -> ContextMesh:
        """From the process group of the whole context group (None: all ranks); consecutive runs of `ulysses` ranks are the Ulysses groups.

        Collective over the group's ranks. Raises ValueError when `ulysses` doesn't divide the group, or its ranks don't ascend.
        """
        group = group if group is not None else dist.group.WORLD
        if group is None:
            raise ValueError("context mesh: no process group; call torch.distributed.init_process_group first, or use ContextMesh.single()")
        ranks = dist.get_process_group_ranks(group)
        _check_ascending(ranks, ranks)
        size, rank = len(ranks), dist.get_rank(group)
        if ulysses < 1 or size % ulysses:
            nearest = max(u for u in range(1, size + 1) if size % u == 0 and u <= max(ulysses, 1))
            raise ValueError(
                f"context mesh: ulysses={ulysses} doesn't divide the {size} ranks of the group; the nearest split that works is {nearest}"
            )
        inner = outer = None
        if ulysses == size:
            inner = group
        elif ulysses == 1:
            outer = group
        else:
            # Each rank makes just the groups that it is in; the members of one group make it in the same order.
            first = rank - rank % ulysses
            inner = _new_group(ranks[first : first + ulysses])
            outer = _new_group(ranks[rank % ulysses :: ulysses])
        return cls(*_groups(inner, outer, group))

    def groups(self) -> tuple[Group, Group, Group]:
        return self.ulysses, self.gather, self.context

    def watch(self, timeout: float, store: dist.Store | None = None) -> Watchdog:
        """Starts a watchdog: a collective that is unfinished after `timeout` seconds is logged with what each rank of its group waits for.

        `store` (for example the `TCPStore` of the job) lets ranks tell each other where they are; without it each speaks for itself.
        """
        self.watchdog = Watchdog(self.groups(), timeout, store)
        return self.watchdog


def _check_ascending(mesh: list, ranks: list[int]) -> None:
    """torch numbers the ranks of a new group in ascending order. Only where the mesh does so too is a rank's place in the whole group
    (where rows come from) its place in the mesh (which rows it holds). Every rank sees the whole mesh, so all raise, or none."""
    if ranks != sorted(ranks):
        raise ValueError(
            f"context mesh: the ranks {mesh} don't ascend row by row; make the mesh with the gather dimension before the Ulysses dimension"
            " and ranks in ascending order, as init_device_mesh does"
        )


def _new_group(ranks: list[int]) -> dist.ProcessGroup:
    group = dist.new_group(ranks, use_local_synchronization=True)
    if not isinstance(group, dist.ProcessGroup):
        raise ValueError(f"context mesh: this rank is not one of {ranks}")
    return group


def _groups(inner: dist.ProcessGroup | None, outer: dist.ProcessGroup | None, whole: dist.ProcessGroup):
    backend = dist.get_backend(whole)
    device = torch.device("cuda", torch.cuda.current_device()) if "nccl" in backend else torch.device("cpu")
    return Group("ulysses", inner), Group("gather", outer), Group("context", whole), device
