"""AdamW with states of 8 bits in blocks of 256 (arXiv 2110.02861), stored as torchao's optimizers store them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from eagle_model.weights import local_rows

from . import codes
from .adamw import load_without_casts
from .block_states import BlockStates
from .rounding import HAS_TRITON, key_of, round_into

SMALLEST = 4096
"""Elements from which torchao keeps a state in 8 bits."""
BLOCK = 256


def in_blocks(elements: int) -> bool:
    """Whether states of so many elements of a rank are kept in 8 bits, and not in float32."""
    return elements >= SMALLEST and elements % BLOCK == 0


def make_adamw8bit(groups: list[dict[str, Any]], names: Mapping[nn.Parameter, str], **options: Any) -> torch.optim.Optimizer:
    """torchao's `AdamW8bit` with another step: one kernel on a GPU, elsewhere compiled once for all shapes (torchao compiles its own for
    every shape).

    - A mean square that became zero when it was quantised, next to a mean that did not, counts as the smallest number of its block. In a
      step without gradient, as of an unseen token's embedding, the weight would else be changed by mean / eps: seen as 388 instead of
      less than 0.03 in one of 262144 weights after two steps of a rate of 0.01.
    - States stand for float32, whatever the weights are. In torchao 0.18 they take the weights' dtype and their views do not, so that
      sharded bfloat16 weights (DTensor takes a view) fail in the first step; and the states of small parameters, which are not quantised,
      would be kept in bfloat16, where `beta2` near 1 changes nothing.
    - Weights in bfloat16 are rounded as `adamw` rounds them (`round_into`): the same on every device and for any number of ranks.

    names: of parameters in bfloat16, which give each its own random numbers. Raises ImportError without torchao.
    """
    from torchao.optim import AdamW8bit  # pyright: ignore[reportMissingImports]
    from torchao.optim.subclass_8bit import OptimState8bit, get_qmap_signed, get_qmap_unsigned  # pyright: ignore[reportMissingImports]

    tables = [torch.tensor(table(), dtype=torch.float32) for table in (get_qmap_signed, get_qmap_unsigned)]
    smallest = tables[1][1].item()
    # The kernel computes codes of these tables; of others, should torchao ever change them, the compiled step looks them up.
    known = HAS_TRITON and all(codes.is_dynamic(table, signed) for table, signed in zip(tables, (True, False)))

    @cache
    def thresholds(device: torch.device) -> tuple[Tensor, Tensor]:
        mean, square = (codes.thresholds(table).to(device) for table in tables)
        return mean, square

    def flat(tensor: Any) -> Tensor:
        """The same memory in one dimension, so that one compiled step serves all shapes; by `data`, because views carry their shapes."""
        if isinstance(tensor, OptimState8bit):
            return OptimState8bit(flat(tensor.codes), tensor.scale, tensor.qmap, tensor.signed)
        return tensor.view(-1).data

    def update(
        weights: Tensor, gradient: Tensor, step: Tensor, mean: Tensor, square: Tensor, block: int,
        lr: Tensor, betas: tuple[float, float], decay: float, eps: float,
    ) -> None:  # fmt: skip
        """One step of [n] elements in float32 (arXiv 1711.05101, algorithm 2). block: elements of a block; 0: states in float32."""
        gradient = gradient.float()
        old_mean, old_square = (state.dequantize() if block else state for state in (mean, square))
        first, second = old_mean.lerp(gradient, 1 - betas[0]), old_square.lerp(gradient.square(), 1 - betas[1])
        mean.copy_(first)
        square.copy_(second)
        if block:
            blocks = second.view(-1, block)
            least = torch.maximum(blocks, blocks.amax(1, keepdim=True) * smallest).view(-1)
            second = torch.where((old_square == 0) & (old_mean != 0), least, second)
        divisor = (second / (1 - betas[1] ** step)).sqrt() + eps
        weights.copy_(weights * (1 - lr * decay) - lr * (first / (1 - betas[0] ** step)) / divisor)

    class Float32States(AdamW8bit):
        @staticmethod
        def _subclass_zeros(p: Tensor, signed: bool, block_size: int) -> Tensor:
            return OptimState8bit.zeros(p.shape, signed, block_size, p.device)

        def _new_buffer(self, p: Any, signed: bool) -> Tensor:
            return super()._new_buffer(p if in_blocks(_local(p).numel()) else torch.empty_like(p, dtype=torch.float32), signed)

        def _state_of(self, parameter: Tensor) -> dict[str, Tensor]:
            state = self.state[parameter]
            if not state:
                state["step"] = torch.tensor(0.0)
                state["exp_avg"], state["exp_avg_sq"] = self._new_buffer(parameter, True), self._new_buffer(parameter, False)
            return state

        @torch.no_grad()
        def step(self, closure: Callable[[], Any] | None = None) -> Any:
            loss = closure() if closure is not None else None
            compiled = torch.compile(update, fullgraph=True, dynamic=True)
            for group in self.param_groups:
                for parameter in group["params"]:
                    if parameter.grad is None:
                        continue
                    state = self._state_of(parameter)
                    state["step"] += 1
                    if _local(parameter).numel() == 0:  # a checkpoint is read only where every rank has a state of every parameter
                        continue
                    tensors = (parameter, parameter.grad, state["exp_avg"], state["exp_avg_sq"])
                    weights, gradient, mean, square = (flat(_local(tensor)) for tensor in tensors)
                    block = self.block_size if isinstance(square, OptimState8bit) else 0
                    low, number = weights.dtype == torch.bfloat16, int(state["step"])
                    key = key_of(names[parameter], number) if low else 0
                    first = local_rows(parameter.detach())[1] * math.prod(parameter.shape[1:]) if low else 0
                    settings = {"betas": group["betas"], "decay": group["weight_decay"], "eps": group["eps"]}
                    if weights.is_cuda and known:
                        from .adamw_kernel import launch

                        more = {"step": number, "lr": float(group["lr"]), "smallest": smallest, "key": key, "first": first}
                        borders = thresholds(weights.device) if block else None
                        launch(weights, gradient.contiguous(), mean, square, block, borders, **settings, **more)
                        continue
                    whole = weights.float()
                    compiled(whole, gradient, state["step"], mean, square, block, group["lr"], **settings)
                    if low:
                        round_into(weights, whole, key, first)
            return loss

        def load_planner(self) -> BlockStates:
            """How a checkpoint's states are read, whichever ranks wrote them."""
            return BlockStates(("exp_avg", "exp_avg_sq"), BLOCK, in_blocks)

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            load_without_casts(self, state_dict, lambda _, name, value: value)  # torchao's states have no `clone`

    return Float32States(groups, block_size=BLOCK, **options)


def _local(tensor: Any) -> Tensor:
    """The rank's rows of a DTensor; any other tensor itself."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor
