"""The operators inside a transformers model, without a dependency on transformers: modules are recognised by the names of their classes."""

from types import MethodType
from typing import Any

from torch import Tensor, nn

from eagle_kernels.ops.rms_norm import rms_norm
from eagle_kernels.ops.swiglu import swiglu_mlp

FAMILIES = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3"}  # folder in transformers.models: prefix of its classes
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def apply_to(model: nn.Module) -> dict[str, int]:
    """Use `rms_norm` and `swiglu_mlp` in the RMSNorm and MLP modules of a transformers Llama, Qwen2 or Qwen3 model, in place.

    Sets the `forward` of these module instances; classes, parameters and state dict stay as they are. Returns the number of changed modules
    by class name. In float32 logits and gradients are equal up to rounding; in lower precision RMSNorm rounds once instead of twice.
    A call falls back to the module's original forward where the operator would change its meaning: projections that are not plain
    `nn.Linear`s without bias (LoRA, quantized, hooked), and norms whose weight and input have different dtypes.

    Raises ValueError, before anything is changed, if the model has RMSNorm or MLP modules of other classes, an activation that is not SiLU,
    projections that are not plain, or modules whose forward is replaced already. For a model with other parts, pass the decoder only.
    """
    norms, mlps = [], []
    for name, module in model.named_modules():
        kind = _kind(name, module)
        if kind is not None:
            (norms if kind == "RMSNorm" else mlps).append(module)
    if not norms and not mlps:
        raise ValueError(f"apply_to: {type(model).__name__} has no RMSNorm or MLP of {', '.join(FAMILIES.values())}; pass a model of these")
    changed: dict[str, int] = {}
    for modules, forward in ((norms, _norm_forward), (mlps, _mlp_forward)):
        for module in modules:
            module.forward = MethodType(forward, module)
            changed[type(module).__name__] = changed.get(type(module).__name__, 0) + 1
    return changed


def _kind(name: str, module: Any) -> str | None:
    """The kind of a module that can be changed, RMSNorm or MLP; None for other modules. Raises ValueError for a similar but unknown one."""
    cls = type(module)
    kind = next((kind for kind in ("RMSNorm", "MLP") if cls.__name__.endswith(kind)), None)
    if kind is None:
        return None
    family = next((f for f, prefix in FAMILIES.items() if cls.__name__ == prefix + kind), None)
    if family is None or not cls.__module__.startswith(f"transformers.models.{family}."):
        raise ValueError(
            f"apply_to: {name or 'the model'} is a {cls.__module__}.{cls.__name__}, which is not supported (supported: {kind} of "
            f"{', '.join(FAMILIES.values())}); pass a submodule without it"
        )
    if "forward" in vars(module):
        raise ValueError(f"apply_to: the forward of {name} is replaced already (by apply_to or by a hook); apply to an unchanged model")
    if kind == "MLP":
        if module.config.hidden_act not in ("silu", "swish"):
            raise ValueError(f"apply_to: the activation of {name} is {module.config.hidden_act!r}, expected 'silu'")
        for projection in PROJECTIONS:
            linear = getattr(module, projection)
            if not _is_plain(linear):
                raise ValueError(
                    f"apply_to: {name}.{projection} is a {type(linear).__name__} with adapter, bias or hooks, expected a plain nn.Linear; "
                    "call apply_to before adapters are added"
                )
    return kind


def _is_plain(linear: Any) -> bool:
    """Whether a call of `linear` is only the product with its weight."""
    return (
        type(linear) is nn.Linear
        and linear.bias is None
        and "forward" not in vars(linear)
        and not any(getattr(linear, hooks, None) for hooks in HOOKS)
    )


def _norm_forward(self: Any, hidden_states: Tensor) -> Tensor:
    if self.weight.dtype != hidden_states.dtype:
        return type(self).forward(self, hidden_states)
    return rms_norm(hidden_states, self.weight, self.variance_epsilon)


def _mlp_forward(self: Any, x: Tensor) -> Tensor:
    linears = [getattr(self, projection) for projection in PROJECTIONS]
    if not all(_is_plain(linear) for linear in linears):
        return type(self).forward(self, x)
    return swiglu_mlp(x, *(linear.weight for linear in linears))
