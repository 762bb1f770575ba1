"""apply_to: logits and gradients of transformers models are unchanged, adapters keep their effect, unknown models are refused."""

import copy

import pytest
import torch
from torch import nn

import eagle_kernels.hugging_face as hugging_face
from eagle_kernels import apply_to

transformers = pytest.importorskip("transformers")

FAMILIES = ("Llama", "Qwen2", "Qwen3")


def tiny(family: str, **changes) -> nn.Module:
    torch.manual_seed(1)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    # With the usual 0.02, gradients of queries and keys would be as small as rounding errors at this width.
    sizes |= {"vocab_size": 40, "head_dim": 16, "initializer_range": 0.2}
    config = getattr(transformers, f"{family}Config")(**(sizes | changes))
    return getattr(transformers, f"{family}ForCausalLM")(config)


def run(model: nn.Module, ids: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    out = model(input_ids=ids, labels=ids)
    model.zero_grad()
    out.loss.backward()
    return out.logits.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.fixture
def calls(monkeypatch) -> list[str]:
    """Names of the operators that ran inside the model."""
    seen: list[str] = []
    for name in ("rms_norm", "swiglu_mlp"):
        operator = getattr(hugging_face, name)
        monkeypatch.setattr(hugging_face, name, lambda *a, operator=operator, name=name: seen.append(name) or operator(*a))
    return seen


def same(family: str, device: str, calls: list[str], relative_error) -> None:
    model = tiny(family).to(device)
    for parameter in model.parameters():
        if parameter.ndim == 1:  # norms and biases start at 1 and 0, where mistakes do not show
            nn.init.uniform_(parameter, 0.5, 1.5)
    changed = copy.deepcopy(model)
    norms = 5 + (4 if family == "Qwen3" else 0)  # Qwen3 also normalises queries and keys
    assert apply_to(changed) == {f"{family}RMSNorm": norms, f"{family}MLP": 2}
    ids = torch.arange(10, device=device).view(2, 5)
    (logits, gradients), (found, others) = run(model, ids), run(changed, ids)
    assert calls.count("rms_norm") == norms
    assert calls.count("swiglu_mlp") == 2
    assert relative_error(found, logits) < 1e-5
    assert others.keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert relative_error(others[name], gradient) < 1e-5, name


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_gradients_are_equal(family, calls, relative_error):
    same(family, "cpu", calls, relative_error)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_gradients_are_equal_with_the_kernels(family, device, calls, relative_error):
    same(family, device, calls, relative_error)


def test_state_dict_and_copies_stay_as_they_are():
    model = tiny("Qwen2")
    names = list(model.state_dict())
    apply_to(model)
    assert list(model.state_dict()) == names
    other = copy.deepcopy(model)
    nn.init.zeros_(other.model.layers[0].mlp.down_proj.weight)
    x = torch.randn(1, 3, 32)
    assert other.model.layers[0].mlp(x).eq(0).all(), "the copy uses the original's weights"
    assert model.model.layers[0].mlp(x).ne(0).any()


class Adapter(nn.Linear):
    """A linear layer with something added to its output, as LoRA adds."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + 1.0


@pytest.mark.parametrize("where", ["adapter", "hook", "bias"])
@pytest.mark.parametrize("projection", ["gate_proj", "up_proj", "down_proj"])
def test_changes_of_a_projection_after_apply_to_keep_their_effect(where, projection, calls):
    model = tiny("Llama")
    expected = copy.deepcopy(model)
    apply_to(model)
    for mlp in (model.model.layers[0].mlp, expected.model.layers[0].mlp):
        linear = getattr(mlp, projection)
        if where == "adapter":
            linear.__class__ = Adapter
        elif where == "hook":
            linear.register_forward_hook(lambda module, args, out: out + 1.0)
        else:
            linear.bias = nn.Parameter(torch.ones(linear.out_features))
    x = torch.randn(2, 3, 32)
    assert torch.equal(model.model.layers[0].mlp(x), expected.model.layers[0].mlp(x))
    assert "swiglu_mlp" not in calls


def test_a_norm_with_another_dtype_than_its_input_keeps_its_result(calls):
    model = tiny("Llama")
    x = torch.randn(2, 3, 32).bfloat16()
    expected = model.model.norm(x)
    apply_to(model)
    found = model.model.norm(x)
    assert found.dtype == expected.dtype == torch.float32
    assert torch.equal(found, expected)
    assert not calls


def test_unknown_models_are_refused_and_unchanged():
    with pytest.raises(ValueError, match="Sequential has no RMSNorm or MLP of Llama, Qwen2, Qwen3"):
        apply_to(nn.Sequential(nn.Linear(4, 4)))
    mixed = nn.ModuleDict({"language": tiny("Qwen2"), "norm": eagle_norm()})
    with pytest.raises(ValueError, match=r"norm is a eagle_kernels\.modules\.RMSNorm, which is not supported"):
        apply_to(mixed)
    assert not any("forward" in vars(module) for module in mixed.modules())
    with pytest.raises(ValueError, match=r"activation of model\.layers\.0\.mlp is 'gelu'"):
        apply_to(tiny("Qwen2", hidden_act="gelu"))
    with pytest.raises(ValueError, match=r"model\.layers\.0\.mlp\.gate_proj is a Linear with adapter, bias or hooks"):
        apply_to(tiny("Llama", mlp_bias=True))
    twice = tiny("Llama")
    apply_to(twice)
    with pytest.raises(ValueError, match="replaced already"):
        apply_to(twice)


def eagle_norm() -> nn.Module:
    from eagle_kernels import RMSNorm

    return RMSNorm(8)
