"""Muon: momentum of a matrix, orthogonalised before each step (Jordan et al. 2024); AdamW for what is not a matrix of a linear layer.

The update is scaled as in arXiv 2502.16982, section 2.2, so that learning rate and weight decay of AdamW carry over.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the polynomial a x + b x^3 + c x^5, which five times over takes singular values of 0.01 to 1 into 0.68 to 1.14 (the original's)."""


def orthogonalised(matrix: Tensor, steps: int = 5) -> Tensor:
    """About `U V^T` of a matrix `U S V^T`: [m, n] -> [m, n], singular values in 0.68 to 1.14 where those of the input are not tiny.

    A Newton-Schulz iteration: bfloat16 on GPUs, float32 elsewhere.
    """
    a, b, c = COEFFICIENTS
    x = matrix.bfloat16() if matrix.is_cuda else matrix.float()
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    x = x / (x.norm() + 1e-7)
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.T if tall else x).to(matrix.dtype)


class Muon(torch.optim.Optimizer):
    """Groups with `matrix` true hold matrices [m, n], updated with orthogonalised Nesterov momentum; all others are updated as by AdamW.

    State: float32 `momentum` of a matrix (4 bytes a parameter); `exp_avg`, `exp_avg_sq` of the rest (8). Sharded matrices are gathered one
    by one for the orthogonalisation, in the same order on every rank.
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
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                update = self._matrix(parameter, group) if group["matrix"] else self._adam(parameter, group)
                parameter.add_(update, alpha=-group["lr"])
        return loss

    def _matrix(self, parameter: Tensor, group: dict[str, Any]) -> Tensor:
        state = self.state[parameter]
        if not state:
            state["momentum"] = torch.zeros_like(parameter)
        momentum = state["momentum"].lerp_(parameter.grad, 1 - group["momentum"])
        ahead = parameter.grad.lerp(momentum, group["momentum"])  # pyright: ignore[reportOptionalMemberAccess]
        rows, columns = parameter.shape
        scale = 0.2 * max(rows, columns) ** 0.5  # the root mean square of AdamW's updates is 0.2 to 0.4
        if not isinstance(ahead, DTensor):
            return orthogonalised(ahead, group["steps"]) * scale
        whole = orthogonalised(ahead.full_tensor(), group["steps"]) * scale
        replicated = DTensor.from_local(whole, ahead.device_mesh, [Replicate()] * ahead.device_mesh.ndim, run_check=False)
        return replicated.redistribute(placements=ahead.placements)

    def _adam(self, parameter: Tensor, group: dict[str, Any]) -> Tensor:
        state, (beta1, beta2) = self.state[parameter], group["betas"]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        state["step"] += 1
        count = float(state["step"])
        mean = state["exp_avg"].lerp_(parameter.grad, 1 - beta1)
        square = state["exp_avg_sq"].mul_(beta2).addcmul_(parameter.grad, parameter.grad, value=1 - beta2)
        return (mean / (1 - beta1**count)) / ((square / (1 - beta2**count)).sqrt() + group["eps"])
