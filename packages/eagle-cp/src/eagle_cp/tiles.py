"""Vision tiles of a context-parallel group: each rank encodes an equal number of them, and features are sent only to the ranks that hold
their tokens.

Rank `r` of `n` encodes tiles `[r N / n, (r + 1) N / n)` of `N`. They are consecutive, so that a rank opens few files and decodes few
frames. Feature rows are then sent to the rows of the sequence that hold their tokens in one all-to-all, and gradients back in another."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from eagle_cp.layout import Layout
from eagle_cp.segments import int_list, integers


class TilePlan:
    """Which tiles this rank encodes, and where feature rows are sent. Made by `plan_tiles`.

    first, last: this rank encodes tiles `[first, last)`.
    count: tiles of the whole pack.
    tokens_per_tile: feature rows of a tile, `k`.
    local_rows: local rows of the layout that hold a feature, `int64 [m]`, ascending, on the CPU.
    """

    def __init__(self, layout: Layout, is_feature: Tensor, tokens_per_tile: int):
        if is_feature.shape != (layout.total,):
            raise ValueError(
                f"plan_tiles: is_feature has shape {tuple(is_feature.shape)}, expected [{layout.total}], one flag per token of the pack"
            )
        if is_feature.is_floating_point():
            raise ValueError(f"plan_tiles: is_feature is {is_feature.dtype}, expected bool (input_ids == image_token_id)")
        (tokens_per_tile,) = integers("plan_tiles: tokens_per_tile", [tokens_per_tile])
        mask = is_feature.to("cpu", torch.bool)
        features = int(mask.sum())
        if tokens_per_tile < 1 or features % tokens_per_tile:
            raise ValueError(
                f"plan_tiles: {features} feature tokens are not a multiple of {tokens_per_tile} tokens per tile; every tile must have all"
                " its tokens in one pack"
            )
        mesh = layout.mesh
        self.tokens_per_tile, self.count = tokens_per_tile, features // tokens_per_tile
        self._made_for = (layout.cu_seqlens, layout.prefixes, mesh.rank, mesh.size)
        bounds = [rank * self.count // mesh.size for rank in range(mesh.size + 1)]
        self.first, self.last = bounds[mesh.rank], bounds[mesh.rank + 1]
        # Feature rows in token order: the rank that encodes each (by tile), and the rank and row that need it (by layout).
        tokens = mask.nonzero().flatten()
        needed = layout.inverse()[tokens]  # row in the whole group
        starts = torch.tensor(bounds[1:-1], dtype=torch.int64) * tokens_per_tile
        encoder = torch.bucketize(torch.arange(features), starts, right=True)
        reader, row = needed // layout.local, needed % layout.local
        mine = reader == mesh.rank
        self.local_rows = row[mine].sort().values
        # Sent: the features of this rank, ordered by reader, then by row there. Received: by encoder, then by row.
        sent = (encoder == mesh.rank).nonzero().flatten()
        order = (reader[sent] * layout.local + row[sent]).argsort()
        self._send = _Index(sent[order] - self.first * tokens_per_tile)
        self.send_counts = _counts(reader[sent], mesh.size)
        arrival = (encoder[mine] * layout.local + row[mine]).argsort()
        rows = row[mine][arrival]
        self._place = _Index(torch.searchsorted(self.local_rows, rows))
        self.receive_counts = _counts(encoder[mine], mesh.size)

    def fits(self, layout: Layout) -> bool:
        """Whether the plan was made for the pack, the rank and the number of ranks of `layout`."""
        return self._made_for == (layout.cu_seqlens, layout.prefixes, layout.mesh.rank, layout.mesh.size)

    def send_order(self, device: torch.device) -> Tensor:
        """Which encoded row is sent first, second, ..., `int64 [(last - first) * k]`."""
        return self._send.on(device)

    def place(self, device: torch.device) -> Tensor:
        """Position among `local_rows` of each received row, `int64 [m]`."""
        return self._place.on(device)


class _Index:
    def __init__(self, index: Tensor):
        self._on = {torch.device("cpu"): index}

    def on(self, device: torch.device) -> Tensor:
        if device not in self._on:
            self._on[device] = self._on[torch.device("cpu")].to(device, non_blocking=True)
        return self._on[device]


def _counts(ranks: Tensor, size: int) -> list[int]:
    return int_list(torch.bincount(ranks, minlength=size))


def plan_tiles(layout: Layout, is_feature: Tensor, tokens_per_tile: int) -> TilePlan:
    """Plans which rank encodes which tiles of a pack. Call it once per batch, on every rank with the same values.

    is_feature: bool `[total]`, marks the tokens of the whole pack that hold features, in the order of tiles (`input_ids ==
        image_token_id`).
    tokens_per_tile: feature rows of a tile, `k`.

    Every rank computes its plan on the host. No communication, except where the layout was built with `verify`. Raises ValueError for a
    mask of another shape, and when the number of feature tokens is not a multiple of `tokens_per_tile`."""
    problem, plan = None, None
    try:
        plan = TilePlan(layout, is_feature, tokens_per_tile)
    except ValueError as error:
        problem = str(error)
    facts = (tokens_per_tile, int_list(is_feature.nonzero().flatten())) if layout.verify else None
    layout.check("plan_tiles", problem, facts, "is_feature or tokens_per_tile")
    assert plan is not None
    return plan


class _ExchangeCtx(FunctionCtx):
    layout: Layout
    plan: TilePlan


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: _ExchangeCtx, features: Tensor, layout: Layout, plan: TilePlan) -> Tensor:
        ctx.layout, ctx.plan = layout, plan
        width, device = features.shape[1], features.device
        sent = features.index_select(0, plan.send_order(device))
        received = _all_to_all(layout, sent, plan.send_counts, plan.receive_counts, width)
        return torch.empty_like(received).index_copy_(0, plan.place(device), received)

    @staticmethod
    def backward(ctx: _ExchangeCtx, grad: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        layout, plan = ctx.layout, ctx.plan
        width, device = grad.shape[1], grad.device
        sent = grad.index_select(0, plan.place(device))
        received = _all_to_all(layout, sent, plan.receive_counts, plan.send_counts, width)
        return torch.empty_like(received).index_copy_(0, plan.send_order(device), received), None, None


def _all_to_all(layout: Layout, rows: Tensor, sent: list[int], received: list[int], width: int) -> Tensor:
    out = rows.new_empty((sum(received), width))
    layout.mesh.context.all_to_all(out.view(-1), rows.view(-1), [n * width for n in received], [n * width for n in sent]).wait()
    return out


def exchange_tiles(features: Tensor, layout: Layout, plan: TilePlan) -> Tensor:
    """Features of the tiles that this rank encoded -> features of its local rows.

    features: `[last - first, k, H]` or `[(last - first) * k, H]`, in the order of tiles. A rank without tiles passes zero of them and still
        takes part.
    plan: from `plan_tiles` for this layout.

    Returns `[m, H]`, one row for each of `plan.local_rows`, in order. On one rank these are the rows of `features`, and nothing is
    communicated. Differentiable; the backward is the reverse exchange, so use the result in the loss on every rank, also where it has no
    row. Raises ValueError for another number of rows, and for a plan of another layout."""
    flat = features.flatten(0, 1) if features.ndim == 3 else features
    layout.check("exchange_tiles", _problem(features, flat, layout, plan), (flat.dtype, flat.shape[-1]), "dtype or width of the features")
    if layout.mesh.size == 1:
        return flat
    return cast(Tensor, _Exchange.apply(flat, layout, plan))  # pyright: ignore[reportUnknownMemberType]


def _problem(features: Tensor, flat: Tensor, layout: Layout, plan: TilePlan) -> str | None:
    if not plan.fits(layout):
        return "exchange_tiles: the plan was made for another layout; call plan_tiles(layout, is_feature, tokens_per_tile) for this one"
    expected = (plan.last - plan.first) * plan.tokens_per_tile
    if flat.ndim != 2 or flat.shape[0] != expected:
        return (
            f"exchange_tiles: got features {tuple(features.shape)}, this rank encodes tiles [{plan.first}, {plan.last}) of {plan.count},"
            f" that is {expected} rows of {plan.tokens_per_tile} per tile"
        )
    return None
