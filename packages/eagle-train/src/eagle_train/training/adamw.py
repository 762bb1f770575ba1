"""AdamW in less memory: weights in bfloat16 with stochastic rounding, and float32 states in host memory.

Both keep float32 moments under torch's names (`step`, `exp_avg`, `exp_avg_sq`), sharded as the parameters are, so that checkpoints and
`carry_optimizer` treat them as those of torch's AdamW.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.adamw import adamw

from eagle_model.weights import local_rows

from .rounding import HAS_TRITON, key_of, round_into

MOMENTS = ("exp_avg", "exp_avg_sq")


def _clone(parameter: nn.Parameter, name: str, value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def load_without_casts(
    optimizer: torch.optim.Optimizer, state_dict: dict[str, Any], kept: Callable[[nn.Parameter, str, Any], Any] = _clone
) -> None:
    """torch's `Optimizer.load_state_dict`, which would cast states to the dtype of their parameters.

    kept(parameter, name, value): what is kept of a value of a parameter's state; default: a copy.
    """
    numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
    own = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    torch.optim.Optimizer.load_state_dict(optimizer, {"state": {}, "param_groups": state_dict["param_groups"]})
    for number, parameter in zip(numbers, own, strict=True):
        if number in state_dict["state"]:
            optimizer.state[parameter] = {name: kept(parameter, name, value) for name, value in state_dict["state"][number].items()}


class _Float32States(torch.optim.Optimizer):
    """An optimizer whose states stay in float32 and where they are when they are loaded; torch's would cast them to the parameters'."""

    def __init__(self, groups: list[dict[str, Any]], *, lr: float, betas: tuple[float, float], eps: float) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in torch, without casts."""
        load_without_casts(self, state_dict, self._kept)

    def _kept(self, parameter: nn.Parameter, name: str, value: Any) -> Any:
        return _clone(parameter, name, value)

    def _state_of(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros(())
            for name in MOMENTS:
                state[name] = torch.zeros_like(parameter, dtype=torch.float32)
        return state

    def _trained(self) -> Iterator[tuple[dict[str, Any], nn.Parameter]]:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    yield group, parameter


class RoundingAdamW(_Float32States):
    """AdamW (arXiv 1711.05101, algorithm 2) computed in float32, whose bfloat16 weights are rounded stochastically (`rounding.py`).

    12 bytes per parameter with its gradient, where float32 weights take 16. names: of the parameters, which give each its own random
    numbers; parameters in float32 are updated without rounding.
    """

    def __init__(self, groups: list[dict[str, Any]], names: dict[nn.Parameter, str], **settings: Any) -> None:
        super().__init__(groups, **settings)
        self._names = names

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One step; closure is not called."""
        for group, parameter in self._trained():
            state = self._state_of(parameter)
            state["step"] += 1
            steps, (first, second) = int(state["step"]), group["betas"]
            weight, offset = local_rows(parameter.detach())
            gradient, mean, square = (_local(tensor) for tensor in (parameter.grad, state["exp_avg"], state["exp_avg_sq"]))
            width = math.prod(parameter.shape[1:])  # a slice of a sharded parameter would gather it
            key = key_of(self._names[parameter], steps) if weight.dtype == torch.bfloat16 else 0
            if weight.is_cuda and HAS_TRITON and all(x.is_contiguous() for x in (weight, mean, square)):
                from .adamw_kernel import launch

                launch(
                    weight, gradient.contiguous(), mean, square, 0, step=steps, lr=float(group["lr"]), betas=group["betas"],
                    decay=group["weight_decay"], eps=group["eps"], smallest=0.0, key=key, first=offset * width,
                )  # fmt: skip
                continue
            gradient = gradient.float()
            mean.lerp_(gradient, 1 - first)
            square.mul_(second).addcmul_(gradient, gradient, value=1 - second)
            divisor = (square / (1 - second**steps)).sqrt_().add_(group["eps"])
            values = weight.float().mul_(1 - group["lr"] * group["weight_decay"])
            values.addcdiv_(mean, divisor, value=-group["lr"] / (1 - first**steps))
            if weight.dtype == torch.bfloat16:
                round_into(weight, values.contiguous(), key, offset * width)
            else:
                weight.copy_(values)


class HostAdamW(_Float32States):
    """torch's AdamW, bit for bit, with its moments in host memory: the device holds those of two parameters at a time.

    On a GPU the moments are pinned. While a parameter is updated, the moments of the next one arrive and those of the one before leave, on
    streams of their own. On a CPU nothing is copied.
    """

    def _state_of(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            for name in MOMENTS:
                state[name] = _on_host(parameter, torch.zeros(_local(parameter).shape, dtype=torch.float32))
        return state

    def _kept(self, parameter: nn.Parameter, name: str, value: Any) -> Any:
        return value.cpu() if name == "step" else _on_host(parameter, _local(value).to("cpu", torch.float32, copy=True))

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One step; closure is not called."""
        work = list(self._trained())
        states = [self._state_of(parameter) for _, parameter in work]
        with _Streams(work[0][1].device if work else torch.device("cpu")) as streams:
            arrived = streams.fetch(states[0]) if work else None
            for number, (group, parameter) in enumerate(work):
                assert arrived is not None
                staged = arrived
                arrived = streams.fetch(states[number + 1]) if number + 1 < len(work) else None
                streams.ready(staged)
                adamw(
                    [_local(parameter.detach())],
                    [_local(parameter.grad)],
                    [staged["exp_avg"]],
                    [staged["exp_avg_sq"]],
                    [],
                    [staged["step"]],
                    fused=True,
                    amsgrad=False,
                    beta1=group["betas"][0],
                    beta2=group["betas"][1],
                    lr=group["lr"],
                    weight_decay=group["weight_decay"],
                    eps=group["eps"],
                    maximize=False,
                )
                streams.store(states[number], staged)


class _Streams:
    """Copies between host and device next to computation; on a CPU the tensors themselves, and no copies."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.gpu = device.type == "cuda"
        if self.gpu:
            self._in, self._out = torch.cuda.Stream(device), torch.cuda.Stream(device)

    def __enter__(self) -> _Streams:
        return self

    def __exit__(self, *_: object) -> None:
        if self.gpu:  # the next step reads on the host's side what this one wrote
            self._out.synchronize()

    def fetch(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The local tensors of a state on the device, as soon as `ready` is called."""
        local = {name: _local(tensor) for name, tensor in state.items()}
        if not self.gpu:
            return local
        with torch.cuda.stream(self._in):
            staged = {name: local[name].to(self.device, non_blocking=True) for name in MOMENTS}
            return staged | {"step": torch.full((), float(local["step"]), device=self.device)}

    def ready(self, staged: dict[str, Tensor]) -> None:
        """Computation that follows waits for what was fetched."""
        if self.gpu:
            current = torch.cuda.current_stream(self.device)
            current.wait_stream(self._in)
            for tensor in staged.values():
                tensor.record_stream(current)

    def store(self, state: dict[str, Tensor], staged: dict[str, Tensor]) -> None:
        """Copy back to the host what computation so far has made of it."""
        if not self.gpu:
            return
        self._out.wait_stream(torch.cuda.current_stream(self.device))
        state["step"] += 1  # counted here: it is not in pinned memory, and copying it back would wait for the parameter's update
        with torch.cuda.stream(self._out):
            for name in MOMENTS:
                _local(state[name]).copy_(staged[name], non_blocking=True)
                staged[name].record_stream(self._out)


def _local(tensor: Any) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _on_host(parameter: Tensor, values: Tensor) -> Tensor:
    """`values` (this rank's part) as a tensor like `parameter` in host memory, pinned for a parameter on a GPU."""
    if parameter.device.type == "cuda":
        values = values.pin_memory()
    # As FSDP2 itself makes parameters that are offloaded: from_local would move the values to the mesh's device.
    return DTensor(values, parameter._spec, requires_grad=False) if isinstance(parameter, DTensor) else values  # type: ignore[call-arg]
