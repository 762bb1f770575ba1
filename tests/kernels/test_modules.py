"""The modules: parameter names as in checkpoints, the same values as the functions, tied heads."""

import pytest
import torch

from eagle_kernels import LinearCrossEntropy, RMSNorm, SwiGLUMLP, linear_cross_entropy, reference


def test_parameter_names_are_those_of_checkpoints():
    assert set(RMSNorm(8).state_dict()) == {"weight"}
    assert set(SwiGLUMLP(8, 12).state_dict()) == {"gate_proj.weight", "up_proj.weight", "down_proj.weight"}
    assert set(LinearCrossEntropy(8, 10).state_dict()) == {"weight"}


def test_values():
    x, residual = torch.randn(2, 5, 8), torch.randn(2, 5, 8)
    norm = RMSNorm(8, eps=1e-5)
    assert torch.equal(norm(x), reference.rms_norm(x, norm.weight, 1e-5))
    normed, total = norm(x, residual)
    assert torch.equal(total, residual + x)
    assert torch.equal(normed, reference.rms_norm(total, norm.weight, 1e-5))
    mlp = SwiGLUMLP(8, 12, rows=3)
    assert torch.equal(mlp(x), mlp.down_proj(torch.nn.functional.silu(mlp.gate_proj(x)) * mlp.up_proj(x)))


def test_head_gives_the_loss_and_the_logits():
    head = LinearCrossEntropy(8, 10)
    hidden, labels = torch.randn(5, 8), torch.randint(0, 10, (5,))
    assert torch.equal(head(hidden, labels), linear_cross_entropy(hidden, head.weight, labels))
    assert torch.allclose(head(hidden, labels), torch.nn.functional.cross_entropy(head.logits(hidden), labels))
    assert head(hidden, labels, return_details=True).token_losses.shape == (5,)


def test_tied_head_shares_the_parameter():
    embedding = torch.nn.Embedding(10, 8)
    head = LinearCrossEntropy(8, 10, weight=embedding.weight)
    assert head.weight is embedding.weight
    with pytest.raises(ValueError, match=r"weight is \(10, 8\), expected \(11, 8\)"):
        LinearCrossEntropy(8, 11, weight=embedding.weight)


def test_meta_device():
    assert LinearCrossEntropy(8, 10, device="meta").weight.is_meta


def test_autocast_with_float32_parameters():
    x, labels = torch.randn(5, 8), torch.randint(0, 10, (5,))
    mlp, head = SwiGLUMLP(8, 12), LinearCrossEntropy(8, 10)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = mlp(x)
        assert out.dtype == torch.bfloat16
        loss = head(out, labels)
    loss.backward()
    assert loss.dtype == torch.float32
    assert mlp.up_proj.weight.grad is not None
    assert head.weight.grad is not None
    assert head.weight.grad.dtype == torch.float32
