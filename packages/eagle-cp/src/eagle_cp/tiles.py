"""Vision tiles of a context group: each rank encodes an even share, and features go only to the ranks whose tokens need them.

Tile `i` of `N` belongs to the rank whose share of `0..N-1` holds it; shares are consecutive, so that a rank opens as few files and
decodes as few frames as it can. Feature rows then travel in one all-to-all to the rows of the sequence that hold their tokens, gradients
the same way back."""

from __future__ import annotations

import torch

from eagle_cp.layout import Layout


class TilePlan:
    """Which tiles this rank encodes and where feature rows go. Host-side and deterministic: every rank computes the same plan without
    communication.

    `first`, `last`: this rank's tiles; `count`: all tiles; `local_rows`: local rows of the layout that hold a feature, `int64 [m]`,
    ascending."""

    def __init__(self, layout: Layout, is_feature: torch.Tensor, tokens_per_tile: int):
        if is_feature.shape != (layout.total,):
            raise ValueError(
                f"tiles: the mask has shape {tuple(is_feature.shape)}, expected [{layout.total}], one flag per token of the pack"
            )
        mask = is_feature.to("cpu", torch.bool)
        features = int(mask.sum())
        if tokens_per_tile < 1 or features % tokens_per_tile:
            raise ValueError(
                f"tiles: {features} feature tokens are not a multiple of {tokens_per_tile} tokens per tile; every tile must have all its"
                " tokens in one pack"
            )
        mesh = layout.mesh
        self.tokens_per_tile, self.count = tokens_per_tile, features // tokens_per_tile
        bounds = [rank * self.count // mesh.size for rank in range(mesh.size + 1)]
        self.first, self.last = bounds[mesh.rank], bounds[mesh.rank + 1]
        # Feature rows in token order; where each one is encoded (by tile) and needed (by layout).
        tokens = mask.nonzero().flatten()
        needed = layout.inverse()[tokens]  # row in the whole group
        starts = torch.tensor(bounds[1:-1], dtype=torch.int64) * tokens_per_tile
        encoded = torch.bucketize(torch.arange(features), starts, right=True)  # rank
        reader, row = needed // layout.local, needed % layout.local
        mine = reader == mesh.rank
        self.local_rows = row[mine].sort().values
        # Sent: my features, ordered by reader, then by row there. Received: by encoder, then by row.
        sent = (encoded == mesh.rank).nonzero().flatten()
        order = (reader[sent] * layout.local + row[sent]).argsort()
        self._send = _Index(sent[order] - self.first * tokens_per_tile)
        self.send_counts = torch.bincount(reader[sent], minlength=mesh.size).tolist()
        arrival = (encoded[mine] * layout.local + row[mine]).argsort()
        rows = row[mine][arrival]
        self._place = _Index(torch.searchsorted(self.local_rows, rows))  # position of each arriving row among `local_rows`
        self.receive_counts = torch.bincount(encoded[mine], minlength=mesh.size).tolist()

    def send_order(self, device: torch.device) -> torch.Tensor:
        return self._send.on(device)

    def place(self, device: torch.device) -> torch.Tensor:
        return self._place.on(device)


class _Index:
    def __init__(self, index: torch.Tensor):
        self._on = {torch.device("cpu"): index}

    def on(self, device: torch.device) -> torch.Tensor:
        if device not in self._on:
            self._on[device] = self._on[torch.device("cpu")].to(device, non_blocking=True)
        return self._on[device]


def plan_tiles(layout: Layout, is_feature: torch.Tensor, tokens_per_tile: int) -> TilePlan:
    """Plans the exchange of a batch and keeps it in `layout.tiles`. `is_feature: bool [total]` marks the tokens of the whole pack that
    hold features, in the order of tiles (`input_ids == image_token_id`). No communication, unless the layout was built with `verify`.
    Raises ValueError when they are no multiple of `tokens_per_tile`."""
    problem, plan = None, None
    try:
        plan = TilePlan(layout, is_feature, tokens_per_tile)
    except ValueError as error:
        problem = str(error)
    facts = (tokens_per_tile, is_feature.nonzero().tolist()) if layout.verify else None
    layout.check("plan_tiles", problem, facts, "is_feature or tokens_per_tile")
    assert plan is not None
    layout.tiles = plan
    return plan


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx, features: torch.Tensor, layout: Layout, plan: TilePlan):
        ctx.layout, ctx.plan = layout, plan
        width, device = features.shape[1], features.device
        sent = features.index_select(0, plan.send_order(device))
        received = _all_to_all(layout, sent, plan.send_counts, plan.receive_counts, width)
        return torch.empty_like(received).index_copy_(0, plan.place(device), received)

    @staticmethod
    def backward(ctx, grad):
        layout, plan = ctx.layout, ctx.plan
        width, device = grad.shape[1], grad.device
        sent = grad.index_select(0, plan.place(device))
        received = _all_to_all(layout, sent, plan.receive_counts, plan.send_counts, width)
        return torch.empty_like(received).index_copy_(0, plan.send_order(device), received), None, None


def _all_to_all(layout: Layout, rows: torch.Tensor, sent: list[int], received: list[int], width: int) -> torch.Tensor:
    out = rows.new_empty((sum(received), width))
    layout.mesh.context.all_to_all(out.view(-1), rows.view(-1), [n * width for n in received], [n * width for n in sent]).wait()
    return out


def exchange_tiles(features: torch.Tensor, layout: Layout) -> torch.Tensor:
    """Features of the tiles that this rank encoded -> features of its local rows. Call `plan_tiles(layout, ...)` once per batch before.

    `features: [last - first, k, H]` or `[(last - first) * k, H]`, in the order of tiles; a rank without tiles passes zero of them and
    still takes part. Returns `[m, H]`, one row for each of `layout.tiles.local_rows`, in order. One rank: the same rows, no
    communication. Differentiable; the backward is the exact reverse, so use the result in the loss on every rank, also where it has no
    row."""
    flat = features.flatten(0, 1) if features.ndim == 3 else features
    if layout.mesh.size == 1:
        return flat
    plan = layout.tiles
    layout.check("exchange_tiles", _problem(features, flat, plan), (flat.dtype, flat.shape[-1]), "dtype or width of the features")
    return _Exchange.apply(flat, layout, plan)


def _problem(features: torch.Tensor, flat: torch.Tensor, plan: TilePlan | None) -> str | None:
    if plan is None:
        return "exchange_tiles: the layout has no tile plan; call plan_tiles(layout, is_feature, tokens_per_tile) first, on every rank"
    expected = (plan.last - plan.first) * plan.tokens_per_tile
    if flat.ndim != 2 or flat.shape[0] != expected:
        return (
            f"exchange_tiles: got features {tuple(features.shape)}, this rank encodes tiles [{plan.first}, {plan.last}) of {plan.count},"
            f" that is {expected} rows of {plan.tokens_per_tile} per tile"
        )
    return None
