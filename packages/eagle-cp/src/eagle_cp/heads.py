"""Which heads a Ulysses rank computes. Any number of query heads; key/value heads are repeated on the ranks that need them."""

from __future__ import annotations

from typing import NamedTuple


class HeadChunk(NamedTuple):
    """Query heads `[q0, q1)` with key/value heads `[k0, k1)`, evenly grouped; numbered within the heads of one rank."""

    q0: int
    q1: int
    k0: int
    k1: int


class HeadShare(NamedTuple):
    """Heads of one Ulysses rank: query heads `[q0, q1)` and key/value heads `[k0, k1)` of the model, and the chunks that cover them.

    chunks: as few as possible, one where the grouping is even; headwise: one key/value head each.
    """

    q0: int
    q1: int
    k0: int
    k1: int
    chunks: tuple[HeadChunk, ...]
    headwise: tuple[HeadChunk, ...]

    @property
    def num_q(self) -> int:
        return self.q1 - self.q0

    @property
    def num_kv(self) -> int:
        return self.k1 - self.k0


def split_heads(num_heads: int, num_kv_heads: int, ulysses: int) -> tuple[HeadShare, ...]:
    """Shares of the heads, one per Ulysses rank. When `ulysses` doesn't divide the heads, some ranks get one more.

    Raises ValueError, with the nearest numbers that work, when the heads can't be grouped or a rank would get none.
    """
    if num_heads < 1 or num_kv_heads < 1 or num_heads % num_kv_heads:
        lower = max((h for h in range(1, num_kv_heads + 1) if num_heads % h == 0), default=1)
        raise ValueError(
            f"heads: {num_heads} query heads can't share {num_kv_heads} key/value heads evenly; the nearest number that works is {lower}"
        )
    if ulysses > num_heads:
        even = max(u for u in range(1, ulysses + 1) if ulysses % u == 0 and u <= num_heads)
        raise ValueError(
            f"heads: {num_heads} query heads can't be split over {ulysses} Ulysses ranks, a rank would get none; the nearest split of this"
            f" group that works is ulysses={even} with {ulysses // even} times as many all-gather ranks"
        )
    group = num_heads // num_kv_heads
    shares: list[HeadShare] = []
    for j in range(ulysses):
        q0, q1 = j * num_heads // ulysses, (j + 1) * num_heads // ulysses
        k0, k1 = q0 // group, (q1 - 1) // group + 1
        headwise: list[HeadChunk] = []
        for k in range(k0, k1):
            a, b = max(q0, k * group), min(q1, (k + 1) * group)
            headwise.append(HeadChunk(a - q0, b - q0, k - k0, k - k0 + 1))
        even = all(c.q1 - c.q0 == headwise[0].q1 - headwise[0].q0 for c in headwise)
        chunks = (HeadChunk(0, q1 - q0, 0, k1 - k0),) if even else tuple(headwise)
        shares.append(HeadShare(q0, q1, k0, k1, chunks, tuple(headwise)))
    return tuple(shares)
