"""Codes of 8-bit optimizer states: entries of a sorted table of 256 values, and where one code ends and the next begins.

The table is the dynamic one of arXiv 1511.04561 as torchao and bitsandbytes make it: zero, one, and in each of seven decades that end at
10**-6 to 1 twice as many values as in the one before, evenly spaced from a tenth of the decade's end to it; with a sign, half as many of
either sign. A code can thus be computed up to the one next to it, where a search in the table takes eight steps.
"""

from __future__ import annotations

import torch
from torch import Tensor

DECADES = 7


def dynamic_table(signed: bool) -> Tensor:
    """The table in float64 [256], sorted."""
    positive = []
    for decade in range(DECADES):
        number = 2**decade if signed else 2 ** (decade + 1)
        inside = (torch.arange(number, dtype=torch.float64) + 0.5) / number
        positive.append(10.0 ** (decade - DECADES + 1) * (0.1 + 0.9 * inside))
    values = torch.cat(positive)
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
    return torch.cat([values, ends, -values] if signed else [values, ends]).sort().values


def is_dynamic(table: Tensor, signed: bool) -> bool:
    """Whether a table [256] is the dynamic one, up to rounding."""
    return table.shape == (256,) and torch.allclose(table.double().cpu(), dynamic_table(signed), rtol=1e-5, atol=1e-12)


def nearest(table: Tensor, values: Tensor) -> Tensor:
    """The code of each value: the entry that is nearest in float32, of two the larger; torchao's rule."""
    code = (torch.searchsorted(table, values, right=True) - 1).clamp(min=0)
    above = (code + 1).clamp(max=len(table) - 1)
    low = table[code]
    return torch.where(values - low >= (table[above] - low) * 0.5, above, code)


def thresholds(table: Tensor) -> Tensor:
    """Float32 [256] on the CPU: the smallest float32 of each code by `nearest`; minus infinity for the first.

    Found by bisection over the numbers of float32 in their order, since rounding in `nearest` moves them from the middles of neighbours.
    """
    table = table.float().cpu()
    below, reached = _order(table[:-1]), _order(table[1:])
    codes = torch.arange(1, len(table))
    while bool((reached - below > 1).any()):
        middle = (below + reached) // 2
        found = nearest(table, _value(middle)) >= codes
        below, reached = torch.where(found, below, middle), torch.where(found, middle, reached)
    return torch.cat([torch.tensor([-torch.inf]), _value(reached)])


def _order(values: Tensor) -> Tensor:
    """Integers in the order of float32 values, neighbours next to each other; both zeros are 0."""
    bits = values.view(torch.int32).long()
    return torch.where(bits < 0, -(bits & 0x7FFFFFFF), bits)


def _value(order: Tensor) -> Tensor:
    """The float32 values of `_order`."""
    return torch.where(order < 0, -order | 0x80000000, order).to(torch.uint32).view(torch.float32)
