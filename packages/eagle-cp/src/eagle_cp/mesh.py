"""ContextMesh: the ranks that share a sequence, in two levels. Inner level: Ulysses (all-to-all over heads). Outer level: all-gather of
keys and values.

Rank `(g, u)` of an `all_gather x ulysses` mesh holds part `u` of the tokens of all-gather rank `g`. Neighbouring ranks are in one Ulysses
group: it moves more data and should stay within a host. The caller makes the mesh and passes it on; there is no global state."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from eagle_cp.collectives import Group
from eagle_cp.segments import int_list
from eagle_cp.watchdog import Watchdog


class ContextMesh:
    """Made by `single()`, `from_device_mesh(...)` or `from_group(...)`.

    ulysses, all_gather: this rank's group of each level; context: the group of all ranks.
    size: `all_gather.size * ulysses.size`; rank: `all_gather.rank * ulysses.size + ulysses.rank`.
    device: where the metadata of a check travels.
    all_gather_gb_s: GB/s that leave a rank in an all-gather (236 were measured on NVLink 4). Collectives overlap with the kernels only
        where this rate is slow against the compute; set it for a slower network.
    """

    def __init__(self, ulysses: Group, all_gather: Group, context: Group, device: torch.device):
        if ulysses.size * all_gather.size != context.size:
            raise ValueError(
                f"context mesh: {all_gather.size} all_gather x {ulysses.size} ulysses ranks, but the whole group has {context.size}"
            )
        self.ulysses, self.all_gather, self.context, self.device = ulysses, all_gather, context, device
        self.size = context.size
        self.rank = all_gather.rank * ulysses.size + ulysses.rank
        self.all_gather_gb_s = 200.0
        self.watchdog: Watchdog | None = None

    def __repr__(self) -> str:
        return f"ContextMesh({self.all_gather.size} all_gather x {self.ulysses.size} ulysses ranks, rank {self.rank})"

    @classmethod
    def single(cls) -> ContextMesh:
        """A mesh of one rank: nothing is communicated."""
        return cls(Group("ulysses", None), Group("all_gather", None), Group("context", None), torch.device("cpu"))

    @classmethod
    def from_device_mesh(cls, mesh: DeviceMesh, *, ulysses: int | None = None) -> ContextMesh:
        """From a 2-D mesh `(all_gather, ulysses)`, or a 1-D mesh of all ranks and the size of the Ulysses level (default: 1).

        Collective over the ranks of `mesh`. Raises ValueError when `ulysses` doesn't divide the group, and when the ranks don't ascend row
        by row.
        """
        if mesh.ndim == 1:
            return cls.from_group(mesh.get_group(), ulysses=ulysses or 1)
        if mesh.ndim != 2:
            raise ValueError(
                f"context mesh: expected a mesh of 1 or 2 dimensions (all_gather, ulysses), got {mesh.ndim};"
                " pass a sub-mesh such as mesh['cp']"
            )
        if ulysses is not None and ulysses != mesh.size(1):
            raise ValueError(f"context mesh: ulysses={ulysses}, but the mesh's second dimension has {mesh.size(1)} ranks")
        ranks = int_list(mesh.mesh.flatten())
        _check_ascending([int_list(row) for row in mesh.mesh], ranks)
        whole = _new_group(ranks)
        return cls(*_groups(mesh.get_group(1), mesh.get_group(0), whole))

    @classmethod
    def from_group(cls, group: dist.ProcessGroup | None = None, *, ulysses: int = 1) -> ContextMesh:
        """From the process group of all ranks that share a sequence (default: the default process group). Every `ulysses` consecutive
        ranks are one Ulysses group.

        Collective over the ranks of `group`. Raises ValueError when `ulysses` doesn't divide the group, and when its ranks don't ascend.
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
            # A rank only makes its own groups; the members of a group make it in the same order.
            first = rank - rank % ulysses
            inner = _new_group(ranks[first : first + ulysses])
            outer = _new_group(ranks[rank % ulysses :: ulysses])
        return cls(*_groups(inner, outer, group))

    def groups(self) -> tuple[Group, Group, Group]:
        """The groups of both levels, and the whole group."""
        return self.ulysses, self.all_gather, self.context

    def watch(self, timeout: float, store: dist.Store | None = None) -> Watchdog:  # pyright: ignore[reportPrivateImportUsage]
        """Starts a watchdog: a collective that is unfinished after `timeout` seconds is logged, with the state of each rank of its group.

        store: where ranks publish their state, for example the `TCPStore` of the job. Default: each rank reports its own state only.
        """
        self.watchdog = Watchdog(self.groups(), timeout, store)
        return self.watchdog


def _check_ascending(mesh: object, ranks: list[int]) -> None:
    """torch numbers the ranks of a new group in ascending order. Only where the mesh does so too is a rank's number in the whole group
    (where rows come from) its number in the mesh (which rows it holds). Every rank has the whole mesh, so that all raise, or none."""
    if ranks != sorted(ranks):
        raise ValueError(
            f"context mesh: the ranks {mesh} don't ascend row by row; make the mesh with the all_gather dimension before the ulysses"
            " dimension and ranks in ascending order, as init_device_mesh does"
        )


def _new_group(ranks: list[int]) -> dist.ProcessGroup:
    group = dist.new_group(ranks, use_local_synchronization=True)
    if not isinstance(group, dist.ProcessGroup):
        raise ValueError(f"context mesh: this rank is not one of {ranks}")
    return group


def _groups(
    inner: dist.ProcessGroup | None, outer: dist.ProcessGroup | None, whole: dist.ProcessGroup
) -> tuple[Group, Group, Group, torch.device]:
    backend = dist.get_backend(whole)
    device = torch.device("cuda", torch.cuda.current_device()) if "nccl" in backend else torch.device("cpu")
    return Group("ulysses", inner), Group("all_gather", outer), Group("context", whole), device
