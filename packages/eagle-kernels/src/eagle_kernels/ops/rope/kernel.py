"""RoPE kernel: a program computes the cosines and sines of `TOKENS` tokens once and rotates every head of q and k with them.

Angles are products of an integer position and a float32 frequency, reduced to one turn in float64 before sine and cosine are computed: a
float32 product is wrong by 0.03 rad at position 1,000,000, and 64 float64 products per token cost no measurable time.
"""

# pyright: reportCallIssue=false, reportArgumentType=false, reportIndexIssue=false, reportOptionalMemberAccess=false
# (kernels are called as kernel[grid](...), and a type checker sees only the function)
import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def cos_sin(fraction, quarter):
    """Cosine and sine of (quarter + fraction) quarter turns, |fraction| <= 1/2, quarter 0..3: minimax polynomials on [-pi/4, pi/4].

    The library's functions include a range reduction (tables, local memory) that is not needed here.
    """
    x = fraction * 1.5707963267948966
    z = x * x
    sin = ((-1.9515295891e-4 * z + 8.3321608736e-3) * z - 1.6666654611e-1) * z * x + x
    cos = ((2.443315711809948e-5 * z - 1.388731625493765e-3) * z + 4.166664568298827e-2) * z * z - 0.5 * z + 1.0
    odd = (quarter & 1) != 0
    c = tl.where(odd, sin, cos)
    s = tl.where(odd, cos, sin)
    c = tl.where((quarter == 1) | (quarter == 2), -c, c)
    s = tl.where(quarter >= 2, -s, s)
    return c, s


@triton.jit
def rotate_head(
    x_ptr, y_ptr, row, x_stride, y_stride, head, x_head_stride, y_head_stride, cos, sin, column, mask, HALF: tl.constexpr
):  # fmt: skip
    x = x_ptr + row[:, None] * x_stride + head * x_head_stride + column[None, :]
    first = tl.load(x, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(x + HALF, mask=mask, other=0.0).to(tl.float32)
    y = y_ptr + row[:, None] * y_stride + head * y_head_stride + column[None, :]
    tl.store(y, (first * cos - second * sin).to(y_ptr.dtype.element_ty), mask=mask)
    tl.store(y + HALF, (second * cos + first * sin).to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def rope_kernel(
    q_ptr, k_ptr, q_out_ptr, k_out_ptr, positions_ptr, inv_freq_ptr, tokens,
    q_stride, q_head_stride, k_stride, k_head_stride, q_out_stride, q_out_head_stride, k_out_stride, k_out_head_stride,
    Q_HEADS: tl.constexpr, K_HEADS: tl.constexpr, HALF: tl.constexpr, SIGN: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    part = tl.program_id(1)
    parts = tl.num_programs(1)
    column = tl.arange(0, BLOCK)
    mask = (row < tokens)[:, None] & (column < HALF)[None, :]
    position = tl.load(positions_ptr + row, mask=row < tokens, other=0).to(tl.float64)
    inv_freq = tl.load(inv_freq_ptr + column, mask=column < HALF, other=0.0).to(tl.float64)
    quarters = position[:, None] * (inv_freq * 0.6366197723675814)[None, :]
    whole = tl.floor(quarters + 0.5)
    cos, sin = cos_sin((quarters - whole).to(tl.float32), (whole - 4.0 * tl.floor(whole * 0.25)).to(tl.int32))
    sin *= SIGN
    for head in range(part, Q_HEADS, parts):
        rotate_head(
            q_ptr, q_out_ptr, row, q_stride, q_out_stride, head, q_head_stride, q_out_head_stride, cos, sin, column, mask, HALF
        )  # fmt: skip
    for head in range(part, K_HEADS, parts):
        rotate_head(
            k_ptr, k_out_ptr, row, k_stride, k_out_stride, head, k_head_stride, k_out_head_stride, cos, sin, column, mask, HALF
        )  # fmt: skip


def shape(half: int) -> tuple[int, int, int, int]:
    """(tokens of a program, columns, programs that share a token's heads, warps)."""
    block = triton.next_power_of_2(half)
    return max(1, 256 // block), block, 4, 2  # the fastest of 36 shapes on an H200, 28 + 4 heads of 128


def launch(q: Tensor, k: Tensor, positions: Tensor, inv_freq: Tensor, q_out: Tensor, k_out: Tensor, backward: bool) -> None:
    """Rotate q [T, Hq, D] into q_out and k [T, Hk, D] into k_out (which may be q and k). backward: the inverse rotation."""
    if q.shape[0] == 0:
        return
    half = q.shape[2] // 2
    tokens, block, parts, warps = shape(half)
    rope_kernel[(triton.cdiv(q.shape[0], tokens), parts)](
        q, k, q_out, k_out, positions.contiguous(), inv_freq.contiguous(), q.shape[0],
        q.stride(0), q.stride(1), k.stride(0), k.stride(1), q_out.stride(0), q_out.stride(1), k_out.stride(0), k_out.stride(1),
        Q_HEADS=q.shape[1], K_HEADS=k.shape[1], HALF=half, SIGN=-1.0 if backward else 1.0, TOKENS=tokens, BLOCK=block, num_warps=warps,
    )  # fmt: skip


def rotate(q: Tensor, k: Tensor, positions: Tensor, inv_freq: Tensor, backward: bool) -> tuple[Tensor, Tensor]:
    q, k = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k))
    q_out, k_out = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k))
    launch(q, k, positions, inv_freq, q_out, k_out, backward)
    return q_out, k_out


def rotate_(q: Tensor, k: Tensor, positions: Tensor, inv_freq: Tensor, backward: bool) -> None:
    launch(q, k, positions, inv_freq, q, k, backward)
