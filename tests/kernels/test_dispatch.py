"""The choice of an implementation, and what `implementation` reports about it."""

import pytest
import torch

import eagle_kernels
from eagle_kernels import implementation, use_implementation
from eagle_kernels.dispatch import OPERATORS

NAMES = ("rms_norm", "add_rms_norm", "rope", "swiglu", "swiglu_mlp", "gelu_linear", "linear_cross_entropy")
NAMES += ("float8_linear", "float8_linears", "float8_mlp")


def test_every_operator_is_declared_and_public():
    assert sorted(OPERATORS) == sorted(NAMES)
    for name in OPERATORS:
        assert callable(getattr(eagle_kernels, name))
        assert callable(getattr(eagle_kernels.reference, name)), f"{name} has no reference"


@pytest.mark.parametrize("name", NAMES)
def test_every_operator_reports_its_implementation(name):
    assert implementation(name, "cpu") == "torch"
    with use_implementation("triton"):
        assert implementation(name, "cpu") == "triton"
        assert implementation(name, "cpu", torch.float64) == "torch"
    assert implementation(name, "cpu") == "torch"


@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES)
def test_the_default_device_is_the_gpu(name):
    assert implementation(name) == "triton"
    with use_implementation("torch"):
        assert implementation(name) == "torch"


def test_unknown_operator_and_implementation():
    with pytest.raises(ValueError, match=r"'rmsnorm' is not an operator; expected one of .*rms_norm"):
        implementation("rmsnorm")
    with pytest.raises(ValueError, match="'cuda' is not an implementation; expected one of triton, torch"), use_implementation("cuda"):
        pass


def test_public_names():
    assert set(eagle_kernels.__all__) == {
        "DecoderShape", "Kept", "LinearCrossEntropy", "LinearCrossEntropyResult", "MemoryPlan", "OffloadEngine", "RMSNorm", "Recompute",
        "SwiGLUMLP", "Training", "VisionShape", "add_rms_norm", "apply_to", "fill_memory", "float8_hardware", "float8_linear",
        "float8_linears", "float8_mlp", "gelu_linear", "implementation",
        "linear_cross_entropy", "offload_checkpoint",
        "plan_memory", "reference", "rms_norm", "rope", "swiglu", "swiglu_mlp", "use_implementation",
    }  # fmt: skip
    assert all(hasattr(eagle_kernels, name) for name in eagle_kernels.__all__)
