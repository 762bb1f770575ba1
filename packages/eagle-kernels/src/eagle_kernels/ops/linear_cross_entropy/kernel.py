"""Cross-entropy of a chunk of logits, which it overwrites with their gradient, and the scaling of stored gradients.

A program processes one row. It reads the row once for maximum and sum, and once more to write the gradient over it.
"""

# pyright: reportCallIssue=false, reportArgumentType=false, reportIndexIssue=false, reportOptionalMemberAccess=false, reportOperatorIssue=false
# (kernels are called as kernel[grid](...), and a type checker sees only the function)
import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def exp(x, PRECISE: tl.constexpr):
    """e^x. The hardware's exp2 of x log2(e) has the rounding error of that product; PRECISE corrects it."""
    if PRECISE:
        product = x * 1.4426950408889634
        rest = tl.fma(x, 1.4426950408889634, -product) + x * 1.925963033500119e-08
        exact = tl.exp2(product) * (1.0 + 0.6931471805599453 * rest)
        return tl.where(x > -100.0, exact, tl.exp(x))
    else:
        return tl.exp(x)


@triton.jit
def load_logits(logits_ptr, offset, label, vocab, PRECISE: tl.constexpr):
    """Logits at `offset`, -inf beyond the vocabulary and, if PRECISE, at the label."""
    x = tl.load(logits_ptr + offset, mask=offset < vocab, other=-float("inf"), eviction_policy="evict_last").to(tl.float32)
    if PRECISE:
        x = tl.where(offset == label, -float("inf"), x)
    return x


@triton.jit
def finite(x):
    return tl.where(x == -float("inf"), 0.0, x)


@triton.jit
def loss_kernel(
    logits_ptr, index_ptr, labels_ptr, weights_ptr, losses_ptr, weighted_ptr, start, vocab, smoothing, z_loss,
    HAS_INDEX: tl.constexpr, HAS_WEIGHTS: tl.constexpr, SMOOTHING: tl.constexpr, GRADIENT: tl.constexpr, PRECISE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    token = start + row
    if HAS_INDEX:
        token = tl.load(index_ptr + token)
    label = tl.load(labels_ptr + token).to(tl.int64)
    weight = 1.0
    if HAS_WEIGHTS:
        weight = tl.load(weights_ptr + token).to(tl.float32)
    logits_ptr += row * vocab
    column = tl.arange(0, BLOCK)
    valid = (label >= 0) & (label < vocab)
    picked = tl.load(logits_ptr + label, mask=valid, other=float("nan")).to(tl.float32)

    # Every lane keeps its own maximum and sum, so that a block needs no reduction across threads, and rescales its sum once per four
    # columns: exponentials limit the speed here as much as memory does. In float32 the sum excludes the label, so that 1 - p is computed
    # from the other columns and not as a difference of nearly equal numbers.
    largest = tl.full((BLOCK,), -float("inf"), dtype=tl.float32)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    plain = tl.zeros((BLOCK,), dtype=tl.float32)
    for start_column in range(0, vocab, 4 * BLOCK):
        offset = start_column + column
        a = load_logits(logits_ptr, offset, label, vocab, PRECISE)
        b = load_logits(logits_ptr, offset + BLOCK, label, vocab, PRECISE)
        c = load_logits(logits_ptr, offset + 2 * BLOCK, label, vocab, PRECISE)
        d = load_logits(logits_ptr, offset + 3 * BLOCK, label, vocab, PRECISE)
        update = tl.maximum(largest, tl.maximum(tl.maximum(a, b), tl.maximum(c, d)))
        # A lane that has read only -inf must not compute inf - inf.
        base = tl.where(update == -float("inf"), 0.0, update)
        fresh = (exp(a - base, PRECISE) + exp(b - base, PRECISE)) + (exp(c - base, PRECISE) + exp(d - base, PRECISE))
        total = total * exp(largest - base, PRECISE) + fresh
        largest = update
        if SMOOTHING:
            plain += (finite(a) + finite(b)) + (finite(c) + finite(d))
    maximum = tl.max(largest, axis=0)
    if PRECISE:
        maximum = tl.maximum(maximum, picked)
    rest = tl.sum(total * exp(largest - maximum, PRECISE), axis=0)
    denominator = rest
    log_sum = tl.log(denominator)
    if PRECISE:
        own = exp(picked - maximum, PRECISE)
        denominator = rest + own
        # log(1 + rest) for a small rest (Kahan): the rounding error of 1 + rest is divided out.
        shifted = denominator - 1.0
        log_sum = tl.where((own == 1.0) & (shifted > 0.0), tl.log(denominator) * (rest / shifted), tl.log(denominator))
        log_sum = tl.where((own == 1.0) & (shifted == 0.0), rest, log_sum)
    lse = maximum + log_sum

    loss = (maximum - picked) + log_sum
    if SMOOTHING:
        mean = tl.sum(plain, axis=0)
        if PRECISE:
            mean += picked
        mean /= vocab
        loss = (1.0 - smoothing) * loss + smoothing * ((maximum - mean) + log_sum)
    loss += z_loss * lse * lse
    tl.store(losses_ptr + token, loss)
    tl.store(weighted_ptr + start + row, loss * weight)

    if GRADIENT:
        tl.debug_barrier()  # the label's logit is read by one thread and overwritten by another
        softmax = weight * (1.0 + 2.0 * z_loss * lse)
        factor = softmax / denominator
        uniform = 0.0
        if SMOOTHING:
            uniform = weight * smoothing / vocab
        blocks = tl.cdiv(vocab, BLOCK)
        for step in range(0, blocks):
            offset = (blocks - 1 - step) * BLOCK + column
            x = tl.load(logits_ptr + offset, mask=offset < vocab, other=-float("inf"), eviction_policy="evict_first").to(tl.float32)
            gradient = exp(x - maximum, PRECISE) * factor - uniform
            if PRECISE:
                at_label = (softmax - weight * (1.0 - smoothing)) - rest * factor - uniform
                gradient = tl.where(offset == label, at_label, gradient)
            else:
                gradient = tl.where(offset == label, gradient - weight * (1.0 - smoothing), gradient)
            gradient = gradient.to(logits_ptr.dtype.element_ty)
            tl.store(logits_ptr + offset, gradient, mask=offset < vocab, eviction_policy="evict_first")


@triton.jit
def rows_kernel(x_ptr, index_ptr, divide_ptr, out_ptr, cols, HAS_INDEX: tl.constexpr, HAS_DIVIDE: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    divisor = 1.0
    if HAS_DIVIDE:
        divisor = tl.load(divide_ptr).to(tl.float32)
    target = row
    if HAS_INDEX:
        target = tl.load(index_ptr + row)
    for start in range(0, cols, BLOCK):
        col = start + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + row * cols + col, mask=col < cols, other=0.0)
        tl.store(out_ptr + target * cols + col, (x / divisor).to(out_ptr.dtype.element_ty), mask=col < cols)


@triton.jit
def scale_kernel(x_ptr, out_ptr, scale_ptr, divide_ptr, count, HAS_DIVIDE: tl.constexpr, IN_PLACE: tl.constexpr, BLOCK: tl.constexpr):
    scale = tl.load(scale_ptr).to(tl.float32)
    if HAS_DIVIDE:
        scale = scale / tl.load(divide_ptr).to(tl.float32)
    # In place with a scale of 1 nothing needs to be written; the value is known only on the device.
    if (scale != 1.0) | (not IN_PLACE):
        offset = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + offset, mask=offset < count, other=0.0).to(tl.float32)
        tl.store(out_ptr + offset, (x * scale).to(out_ptr.dtype.element_ty), mask=offset < count)


def loss_shape(vocab: int) -> tuple[int, int]:
    """(columns of a block, warps)."""
    block = min(triton.next_power_of_2(vocab), 2048)
    return block, max(1, min(16, block // 128))


def launch_loss(
    logits: Tensor, index: Tensor | None, labels: Tensor, weights: Tensor | None,
    losses: Tensor, weighted: Tensor, start: int, smoothing: float, z_loss: float, gradient: bool,
) -> None:  # fmt: skip
    """Write the losses of `logits` [n, V], the kept rows `start` to `start + n`, to `losses` [T] (at each row's token) and, weighted, to
    `weighted` [kept]. gradient: overwrite the logits with the gradient of the sum of the weighted losses."""
    block, warps = loss_shape(logits.shape[1])
    loss_kernel[(logits.shape[0],)](
        logits, index if index is not None else labels, labels, weights if weights is not None else losses,
        losses, weighted, start, logits.shape[1], smoothing, z_loss,
        HAS_INDEX=index is not None, HAS_WEIGHTS=weights is not None, SMOOTHING=smoothing > 0, GRADIENT=gradient,
        PRECISE=logits.dtype == torch.float32, BLOCK=block, num_warps=warps,
    )  # fmt: skip


def launch_rows(x: Tensor, index: Tensor | None, divide: Tensor | None, out: Tensor) -> None:
    """`out[index[i]] = x[i] / divide`, rounded to out's dtype. x: [n, H], index: [n] (None: i), divide: 0-dim (None: 1), out: [T, H]."""
    block = min(1024, triton.next_power_of_2(x.shape[1]))
    rows_kernel[(x.shape[0],)](
        x, index if index is not None else x, divide if divide is not None else x, out, x.shape[1],
        HAS_INDEX=index is not None, HAS_DIVIDE=divide is not None, BLOCK=block, num_warps=4,
    )  # fmt: skip


def launch_scale(x: Tensor, scale: Tensor, divide: Tensor | None, dtype: torch.dtype, in_place: bool) -> Tensor:
    """`x * scale / divide` as `dtype`. in_place: write over x if that is its dtype."""
    in_place = in_place and dtype == x.dtype
    out = x if in_place else torch.empty(x.shape, dtype=dtype, device=x.device)
    block = 4096
    if x.numel() > 0:
        scale_kernel[(triton.cdiv(x.numel(), block),)](
            x, out, scale, divide if divide is not None else scale, x.numel(),
            HAS_DIVIDE=divide is not None, IN_PLACE=in_place, BLOCK=block, num_warps=8,
        )  # fmt: skip
    return out
