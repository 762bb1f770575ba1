"""Language head and cross-entropy in one operator that stores at most one chunk of logits.

Forward processes the kept rows in chunks: a matmul makes the logits (cuBLAS), a fused kernel computes their losses and overwrites them with
their gradient, and two more matmuls make the gradients of hidden and weight. Backward only multiplies by the incoming gradient.
The weight gradient is one float32 matrix to which every chunk is added inside the matmul (beta = 1), so nothing is rounded in between.
The division by the denominator follows the matmuls: before them it would be rounded in the label's entry of every row, in the same
direction each time.
"""

from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor

from eagle_kernels.dispatch import declare, register, use_triton
from eagle_kernels.matmul import accumulate_, product_in_float32
from eagle_kernels.ops.linear_cross_entropy import reference
from eagle_kernels.ops.linear_cross_entropy.checks import check
from eagle_kernels.weights import gathered, gradient_dtype

declare("linear_cross_entropy")

# Logits of one chunk, at most: 3584 rows of 152064 in bf16 are 1.02 GiB. Fewer rows make the matmuls slower; more rows only use memory.
CHUNK_BYTES = 1100 << 20
ROW_MULTIPLE = 512  # on an H200 the gradient of hidden took 4 % less time per row with 3584 rows than with 3641


class LinearCrossEntropyResult(NamedTuple):
    """loss: 0-dim; token_losses: [...], unweighted, 0 where ignored, no gradient; count: 0-dim int64, number of kept rows."""

    loss: Tensor
    token_losses: Tensor
    count: Tensor  # pyright: ignore[reportIncompatibleMethodOverride]  (hides tuple.count, which a result does not need)


def chunk_rows(kept: int, vocab: int, itemsize: int) -> int:
    """Rows of logits in a chunk: as few chunks as CHUNK_BYTES allows, as equal as multiples of ROW_MULTIPLE permit."""
    most = max(1, CHUNK_BYTES // (vocab * itemsize))
    unit = ROW_MULTIPLE if most >= ROW_MULTIPLE else 1
    chunks = -(-kept // (most // unit * unit))
    return min(kept, -(-kept // (max(1, chunks) * unit)) * unit)


def kept_rows(labels: Tensor, token_weights: Tensor | None, ignore_index: int, num_kept: int) -> tuple[Tensor | None, Tensor, int]:
    """(indices of kept rows, or None for all rows; their count on the device; their number). num_kept -1: wait for the device's count."""
    keep = labels != ignore_index
    if token_weights is not None:
        keep = keep & (token_weights != 0)
    count = keep.sum()
    if num_kept < 0:
        rows = keep.nonzero().squeeze(1)
        return (None if rows.numel() == labels.numel() else rows), count, rows.numel()
    if num_kept == labels.numel():
        return None, count, num_kept
    # nonzero() without a wait: a kept row is written to its rank among the kept rows, all others to one spare slot at the end.
    rank = keep.cumsum(0) - 1
    slot = torch.where(keep & (rank < num_kept), rank, num_kept)
    rows = torch.zeros(num_kept + 1, dtype=torch.int64, device=labels.device)
    rows.scatter_(0, slot, torch.arange(labels.numel(), device=labels.device))
    return rows[:num_kept], count, num_kept


def _forward(
    hidden: Tensor, weight: Tensor, labels: Tensor, token_weights: Tensor | None, denominator: Tensor | None,
    smoothing: float, z_loss: float, ignore_index: int, num_kept: int, need_hidden: bool, need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    from eagle_kernels.ops.linear_cross_entropy.kernel import launch_loss, launch_rows

    device, (tokens, _), vocab = hidden.device, hidden.shape, weight.shape[0]
    gradient = need_hidden or need_weight
    # Ignored rows have loss 0 and gradient 0; everything else is written below.
    losses = torch.zeros(tokens, dtype=torch.float32, device=device)
    rows, count, kept = kept_rows(labels, token_weights, ignore_index, num_kept)
    dhidden = hidden.new_zeros(hidden.shape if need_hidden and rows is not None else 0)
    if need_hidden and rows is None:
        dhidden = torch.empty_like(hidden, memory_format=torch.contiguous_format)
    dweight = torch.empty(weight.shape if need_weight else (0, 0), dtype=torch.float32, device=device)
    divisor = torch.ones((), dtype=torch.float32, device=device)
    if denominator is not None:
        divisor = denominator.to(device=device, dtype=torch.float32).clone()
    elif token_weights is not None and kept > 0:
        divisor = (token_weights if rows is None else token_weights[rows]).float().sum()
    elif kept > 0:
        divisor = count.float()
    if kept == 0:
        divisor = torch.ones_like(divisor)  # 0 / 0 is 0 here
    if num_kept >= 0:
        divisor = torch.where(count == num_kept, divisor, torch.nan)  # a wrong count gives NaN without waiting for the device
    if kept == 0:
        return divisor * 0, losses, count, dhidden.zero_(), dweight.zero_(), divisor

    # float16 underflows for gradients divided by a large denominator: there hidden's gradient, too, is divided in backward.
    divide = None if hidden.dtype == torch.float16 else divisor
    weighted = torch.empty(kept, dtype=torch.float32, device=device)
    step = chunk_rows(kept, vocab, hidden.element_size())
    logits = torch.empty((step, vocab), dtype=hidden.dtype, device=device)
    for start in range(0, kept, step):
        stop = min(kept, start + step)
        index = rows[start:stop] if rows is not None else None
        part = hidden[start:stop] if index is None else hidden[index]
        chunk = logits[: stop - start]
        torch.mm(part, weight.t(), out=chunk)
        launch_loss(chunk, rows, labels, token_weights, losses, weighted, start, smoothing, z_loss, gradient)
        if need_weight:
            accumulate_(dweight, chunk.t(), part, first=start == 0)
        del part
        if need_hidden:
            product = product_in_float32(chunk, weight)
            launch_rows(product, index, divide, dhidden if index is not None else dhidden[start:stop])
            del product
    return weighted.sum() / divisor, losses, count, dhidden, dweight, divisor


def _forward_fake(hidden, weight, labels, token_weights, denominator, smoothing, z_loss, ignore_index, num_kept, need_hidden, need_weight):
    scalar = hidden.new_empty((), dtype=torch.float32)
    return (
        scalar,
        hidden.new_empty(hidden.shape[0], dtype=torch.float32),
        hidden.new_empty((), dtype=torch.int64),
        hidden.new_empty(hidden.shape if need_hidden else (0,)),
        hidden.new_empty(weight.shape if need_weight else (0, 0), dtype=torch.float32),
        torch.empty_like(scalar),
    )


def _scaled(x: Tensor, scale: Tensor, divide: Tensor | None, dtype: torch.dtype) -> Tensor:
    from eagle_kernels.ops.linear_cross_entropy.kernel import launch_scale

    return launch_scale(x, scale, divide, dtype, in_place=False)


def _scale_(x: Tensor, scale: Tensor, divide: Tensor | None) -> None:
    from eagle_kernels.ops.linear_cross_entropy.kernel import launch_scale

    launch_scale(x, scale, divide, x.dtype, in_place=True)


register(
    "linear_cross_entropy_forward(Tensor hidden, Tensor weight, Tensor labels, Tensor? token_weights, Tensor? denominator, "
    "float smoothing, float z_loss, int ignore_index, int num_kept, bool need_hidden, bool need_weight)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _forward,
    _forward_fake,
)
register(
    "scaled(Tensor x, Tensor scale, Tensor? divide, ScalarType dtype) -> Tensor",
    _scaled,
    lambda x, scale, divide, dtype: torch.empty_like(x, dtype=dtype),
)
register("scale_(Tensor(a!) x, Tensor scale, Tensor? divide) -> ()", _scale_, lambda x, scale, divide: None)


def _graph_is_kept() -> bool:
    """Whether the running backward keeps its graph (retain_graph=True); then stored gradients must not be scaled in place."""
    if torch.compiler.is_compiling():
        return True
    autograd = getattr(torch._C, "_autograd", None)
    keep_graph = getattr(autograd, "_get_current_graph_task_keep_graph", None)
    return keep_graph is None or keep_graph()


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, token_weights: Tensor | None, denominator: Tensor | None,
        smoothing: float, z_loss: float, ignore_index: int, num_kept: int, weight_dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        need_hidden, need_weight = ctx.needs_input_grad[0], ctx.needs_input_grad[1]
        loss, losses, count, dhidden, dweight, divisor = torch.ops.eagle_kernels.linear_cross_entropy_forward(
            hidden, weight.to(hidden.dtype), labels, token_weights, denominator,
            smoothing, z_loss, ignore_index, num_kept, need_hidden, need_weight,
        )  # fmt: skip
        ctx.save_for_backward(dhidden, dweight, divisor)
        ctx.needs = (need_hidden, need_weight)
        ctx.weight_dtype = weight_dtype
        ctx.mark_non_differentiable(losses, count)
        return loss, losses, count

    @staticmethod
    def backward(ctx: Any, dloss: Tensor, *_: Any) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        dhidden, dweight, divisor = ctx.saved_tensors
        need_hidden, need_weight = ctx.needs
        in_place = not _graph_is_kept()

        def scaled(x: Tensor, dtype: torch.dtype, divide: Tensor | None) -> Tensor:
            if in_place and x.dtype == dtype:
                torch.ops.eagle_kernels.scale_(x, dloss, divide)
                return x
            return torch.ops.eagle_kernels.scaled(x, dloss, divide, dtype)

        undivided = divisor if dhidden.dtype == torch.float16 else None
        out_hidden = scaled(dhidden, dhidden.dtype, undivided) if need_hidden else None
        out_weight = scaled(dweight, ctx.weight_dtype, divisor) if need_weight else None
        return out_hidden, out_weight, None, None, None, None, None, None, None, None


@overload
def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, *, token_weights: Tensor | None = None, denominator: Tensor | float | None = None,
    label_smoothing: float = 0.0, z_loss: float = 0.0, ignore_index: int = -100, num_kept: int | None = None,
    return_details: Literal[False] = False, validate: bool = False,
) -> Tensor: ...  # fmt: skip


@overload
def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, *, token_weights: Tensor | None = None, denominator: Tensor | float | None = None,
    label_smoothing: float = 0.0, z_loss: float = 0.0, ignore_index: int = -100, num_kept: int | None = None,
    return_details: Literal[True], validate: bool = False,
) -> LinearCrossEntropyResult: ...  # fmt: skip


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, *, token_weights: Tensor | None = None, denominator: Tensor | float | None = None,
    label_smoothing: float = 0.0, z_loss: float = 0.0, ignore_index: int = -100, num_kept: int | None = None,
    return_details: bool = False, validate: bool = False,
) -> Tensor | LinearCrossEntropyResult:  # fmt: skip
    """`sum_i w_i l_i / denominator`, where l_i is the cross-entropy of `hidden[i] weight^T` with `labels[i]`. Labels are not shifted here.

    hidden: [..., H] (more than one leading dimension is flattened: a view where the strides allow it, else a copy); weight: [V, H], of
    hidden's dtype or float32 (cast once), also a DTensor (gathered once); labels: [...] integers; token_weights: [...] float32, default 1;
    denominator: 0-dim tensor, the global sum of weights (default: the sum over the kept rows of this call).
    With smoothing e and z_loss z: `l = (1-e)(lse - x_y) + e(lse - mean(x)) + z lse^2` (Szegedy et al. 2016; Chowdhery et al. 2022).
    ignore_index: rows with this label, and rows with weight 0, are removed before the matmul.
    num_kept: the number of rows that remain; with it nothing waits for the device, and a wrong number makes the loss and its gradients NaN.
    validate: check labels, num_kept and denominator on the device, and wait for it. Without it, a label out of range gives NaN on a GPU.
    Returns the loss (0-dim float32), or with return_details a `LinearCrossEntropyResult`.

    The weight gradient is accumulated in float32 and returned as `weight.grad_dtype` (float32 on a bf16 parameter keeps the float32 sum),
    else in the weight's dtype. Raises ValueError or TypeError for shapes, dtypes or values that do not match.
    """
    denominator = check(hidden, weight, labels, token_weights, denominator, label_smoothing, z_loss, ignore_index, num_kept, validate)
    leading = labels.shape
    if hidden.ndim > 2:
        hidden, labels = hidden.flatten(0, -2), labels.flatten()
        token_weights = token_weights.flatten() if token_weights is not None else None
    weight_dtype = gradient_dtype(weight)
    weight = gathered(weight)
    if torch.is_autocast_enabled(hidden.device.type):
        hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
    with torch.autocast(hidden.device.type, enabled=False):
        if use_triton(hidden):
            result = _LinearCrossEntropy.apply(
                hidden, weight, labels.contiguous(), token_weights.contiguous() if token_weights is not None else None, denominator,
                float(label_smoothing), float(z_loss), ignore_index, -1 if num_kept is None else num_kept, weight_dtype,
            )  # fmt: skip
        else:
            result = reference.linear_cross_entropy(
                hidden, weight.to(hidden.dtype), labels, token_weights=token_weights, denominator=denominator,
                label_smoothing=label_smoothing, z_loss=z_loss, ignore_index=ignore_index, num_kept=num_kept,
            )  # fmt: skip
    loss, token_losses, count = result
    return LinearCrossEntropyResult(loss, token_losses.view(leading), count) if return_details else loss
