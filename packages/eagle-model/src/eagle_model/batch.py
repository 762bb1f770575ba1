"""The tensors of a pack: made by the loader from numpy arrays, split over context parallel ranks, moved to the device, given to `forward`.

torch is imported when a method needs it: the loader's processes make packed batches without it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from eagle_model.prompt.render import IGNORE_INDEX

if TYPE_CHECKING:
    import torch

    from eagle_cp import Layout, TilePlan

_PER_TOKEN = ("input_ids", "targets", "position_ids", "token_weights")
_ARRAYS = (*_PER_TOKEN, "visual_index", "tiles")


@dataclass(frozen=True, eq=False)
class PackedBatch:
    """One pack. T tokens, N tiles of s x s pixels, k visual tokens a tile, S samples. Arrays are numpy, or tensors after `to`.

    input_ids, targets (shifted: the id that follows, -100 ignored), position_ids (restarting with every sample; those of a branch continue
    from the end of its prefix): int64 [T]. token_weights: float32 [T], weight of each target in the loss. cu_seqlens: S + 1 offsets of the
    samples. prefixes: for samples that share a prefix, S numbers: the place of the prefix that each one continues, or -1
    (`eagle_cp.Layout.build`). A prefix is in the pack once, directly before its branches, and has no targets: its last token is followed
    by a token of each branch, so the first token of a branch is not a target (`eagle_model.prompt.share_prefix` cuts samples so).
    tiles: uint8 [N, s, s, 3], or a rank's share of the N. visual_index: int64 [N * k], where the visual tokens stand, in order of tiles.
    num_kept: targets that carry loss. label_weight: sum of their weights. denominator: what the loss is divided by, 0-dim float32; None:
    the weights of this batch.
    tile_plan: exchange of visual features between context parallel ranks (`eagle_cp.plan_tiles`), after `shard` with several ranks.
    """

    input_ids: Any
    targets: Any
    position_ids: Any
    token_weights: Any
    cu_seqlens: tuple[int, ...]
    tiles: Any
    visual_index: Any
    num_kept: int
    label_weight: float
    denominator: Any = None
    tile_plan: TilePlan | None = None
    prefixes: tuple[int, ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays."""
        return sum(getattr(self, name).nbytes for name in _ARRAYS)

    def check_layout(self, layout: Layout) -> None:
        """Raises ValueError when `layout` keeps other tokens apart than the pack does."""
        prefixes = self.prefixes if any(prefix >= 0 for prefix in self.prefixes) else ()
        if layout.cu_seqlens != tuple(self.cu_seqlens) or layout.prefixes != tuple(prefixes):
            raise ValueError(
                f"the layout is of {len(layout.lengths)} samples with prefixes {list(layout.prefixes[:6])}, the packed batch of "
                f"{len(self.cu_seqlens) - 1} with {list(prefixes[:6])}; build it from the batch's cu_seqlens and prefixes"
            )

    def shard(self, layout: Layout, tokens_per_tile: int) -> PackedBatch:
        """This context parallel rank's part: its tokens by `layout`, and the plan by which visual features travel to them.

        `tiles` must already be the share of this rank (`TilePlan.first` ... `last`). With one rank nothing changes.
        Raises ValueError when the visual tokens are not a multiple of `tokens_per_tile`, and for the layout of another pack.
        """
        self.check_layout(layout)
        if layout.mesh.size == 1:
            return self
        import torch

        from eagle_cp import plan_tiles

        is_visual = torch.zeros(layout.total, dtype=torch.bool)
        is_visual[torch.as_tensor(self.visual_index)] = True
        tile_plan = plan_tiles(layout, is_visual, tokens_per_tile)
        parts: dict[str, Any] = {
            name: layout.shard(torch.as_tensor(getattr(self, name)), fill=IGNORE_INDEX if name == "targets" else 0) for name in _PER_TOKEN
        }
        kept = int(((parts["targets"] != IGNORE_INDEX) & (parts["token_weights"] != 0)).sum())
        return replace(self, **parts, visual_index=tile_plan.local_rows, num_kept=kept, tile_plan=tile_plan)

    def layout(self) -> Layout:
        """The pack on one rank. Raises ValueError for offsets or prefixes that do not fit together."""
        from eagle_cp import Layout

        return Layout.single(self.cu_seqlens, self.prefixes or None)

    def to(self, device: torch.device | str) -> PackedBatch:
        """The same with tensors on `device`; copies to a GPU go through pinned memory and don't wait."""
        import torch

        device = torch.device(device)

        def move(value: Any) -> Any:
            tensor = torch.from_numpy(value) if isinstance(value, np.ndarray) else value
            if device.type == "cuda" and tensor.device.type == "cpu":
                tensor = tensor.pin_memory()
            return tensor.to(device, non_blocking=True)

        return replace(self, **{name: move(getattr(self, name)) for name in _ARRAYS})
