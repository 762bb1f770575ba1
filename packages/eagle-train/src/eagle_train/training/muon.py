"""Muon: momentum of a matrix, orthogonalised before each step (Jordan et al. 2024); AdamW for what is not a matrix of a linear layer.

The update is scaled as in arXiv 2502.16982, section 2.2, so that learning rate and weight decay of AdamW carry over.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate
from torch.optim.adamw import adamw

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the polynomial a x + b x^3 + c x^5, which five times over takes singular values of 0.01 to 1 into 0.68 to 1.14 (the original's)."""
BATCH_ELEMENTS = 1 << 22
"""Matrices of one shape are orthogonalised together as long as they have so many elements: small ones cost their launches and calls, large
ones their arithmetic, and their copies memory."""


def orthogonalised(matrices: Tensor, steps: int = 5) -> Tensor:
    """About `U V^T` of matrices `U S V^T`: [..., m, n] -> [..., m, n], singular values in 0.68 to 1.14 where those of the input are not
    tiny.

    A Newton-Schulz iteration: bfloat16 on GPUs, float32 elsewhere.
    """
    a, b, c = COEFFICIENTS
    x = matrices.bfloat16() if matrices.is_cuda else matrices.float()
    tall = x.shape[-2] > x.shape[-1]
    x = (x.mT if tall else x).reshape(-1, *sorted(x.shape[-2:]))
    x = x / (torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).reshape(matrices.shape).to(matrices.dtype)


class Muon(torch.optim.Optimizer):
    """Groups with `matrix` true hold matrices [m, n], updated with orthogonalised Nesterov momentum; all others are updated as by AdamW.

    State: float32 `momentum` of a matrix (4 bytes a parameter); `exp_avg`, `exp_avg_sq` of the rest (8). Sharded matrices are gathered for
    the orthogonalisation, at most a batch at a time, in the same order on every rank.
    """

    def __init__(
        self, groups: list[dict[str, Any]], *, lr: float, betas: tuple[float, float], eps: float, momentum: float = 0.95, steps: int = 5
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "momentum": momentum, "steps": steps, "weight_decay": 0.0, "matrix": False}
        super().__init__(groups, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step; returns what `closure` returns."""
        loss = closure() if closure is not None else None
        for group in self.param_groups:
            learning = [parameter for parameter in group["params"] if parameter.grad is not None]
            if group["matrix"]:
                for batch in _batches(learning):
                    self._step_matrices(batch, group)
            elif learning:
                self._step_others(learning, group)
        return loss

    def _step_matrices(self, batch: list[Tensor], group: dict[str, Any]) -> None:
        """batch: of one shape."""
        for parameter in batch:
            if not self.state[parameter]:
                self.state[parameter]["momentum"] = torch.zeros_like(parameter)
        gradients = [_local(parameter.grad) for parameter in batch]
        momenta = [_local(self.state[parameter]["momentum"]) for parameter in batch]
        torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
        ahead = torch._foreach_lerp(gradients, momenta, group["momentum"])
        whole = torch.stack([_whole(one, like) for one, like in zip(ahead, batch)])
        updates = orthogonalised(whole, group["steps"]).unbind()
        scale = 0.2 * max(batch[0].shape) ** 0.5  # the root mean square of AdamW's updates is 0.2 to 0.4
        weights = [_local(parameter) for parameter in batch]
        torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(weights, [_part(one, like) for one, like in zip(updates, batch)], alpha=-group["lr"] * scale)

    def _step_others(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        for parameter in parameters:
            if not self.state[parameter]:
                averages = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
                self.state[parameter] |= {"step": torch.zeros((), dtype=torch.float32, device=parameter.device)} | averages
        gradients = [_local(parameter.grad) for parameter in parameters]
        means, squares, counts = ([_local(self.state[one][name]) for one in parameters] for name in ("exp_avg", "exp_avg_sq", "step"))
        (beta1, beta2), settings = group["betas"], {name: group[name] for name in ("lr", "weight_decay", "eps")}
        adamw(
            [_local(parameter) for parameter in parameters], gradients, means, squares, [], counts,
            fused=True, amsgrad=False, maximize=False, beta1=beta1, beta2=beta2, **settings,
        )  # fmt: skip


def _batches(matrices: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Matrices of one shape, at most BATCH_ELEMENTS together or one alone."""
    shapes: dict[Any, list[Tensor]] = defaultdict(list)
    for matrix in matrices:
        shapes[matrix.shape, matrix.dtype, matrix.device].append(matrix)
    for alike in shapes.values():
        size = max(1, BATCH_ELEMENTS // max(1, alike[0].numel()))
        yield from (alike[start : start + size] for start in range(0, len(alike), size))


def _local(tensor: Any) -> Tensor:
    """What this rank holds: torch 2.11 knows few operations on lists of sharded tensors."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _whole(local: Tensor, like: Tensor) -> Tensor:
    """The whole of a tensor that is divided over ranks as another, gathered from their parts."""
    if not isinstance(like, DTensor):
        return local
    placed = DTensor.from_local(local, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride())
    return placed.full_tensor()


def _part(whole: Tensor, like: Tensor) -> Tensor:
    """This rank's part of a tensor that every rank has."""
    if not isinstance(like, DTensor):
        return whole
    replicated = DTensor.from_local(whole, like.device_mesh, [Replicate()] * like.device_mesh.ndim, run_check=False)
    return replicated.redistribute(placements=like.placements).to_local()
