"""`eagle_train.training.adamw_kernel._nearest` alone; imported where Triton interprets or compiles."""

import torch
import triton
import triton.language as tl

from eagle_train.training.adamw_kernel import _nearest


@triton.jit
def _kernel(thresholds, given, out, count, ZERO: tl.constexpr, FIRST: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(given + i, mask=i < count, other=0.0)
    tl.store(out + i, _nearest(thresholds, value, ZERO, FIRST), mask=i < count)


def nearest(thresholds, values, *, zero, first):
    """Codes of `values`, int32 on their device."""
    out = torch.empty(len(values), dtype=torch.int32, device=values.device)
    _kernel[(triton.cdiv(len(values), 1024),)](thresholds, values, out, len(values), ZERO=zero, FIRST=first, BLOCK=1024)
    return out
