"""Sharded weights: FSDP2 around the modules, and weights that are DTensors; two processes on the CPU equal one."""

import pytest
import torch
import torch.distributed as dist
from torch import nn

from eagle_kernels import LinearCrossEntropy, OffloadEngine, RMSNorm, SwiGLUMLP, linear_cross_entropy, offload_checkpoint, rms_norm
from tests.support.ranks import run_on_ranks

HIDDEN, INNER, VOCAB, TOKENS = 64, 96, 50, 4096  # a hidden state of 1 MiB: large enough for the engine to move it


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.layers = nn.ModuleList(nn.Sequential(RMSNorm(HIDDEN), SwiGLUMLP(HIDDEN, INNER, rows=1000)) for _ in range(3))
        self.head = LinearCrossEntropy(HIDDEN, VOCAB)

    def forward(self, x: torch.Tensor, labels: torch.Tensor, denominator: torch.Tensor, engine: OffloadEngine | None) -> torch.Tensor:
        for layer in self.layers:
            x = x + offload_checkpoint(layer, x, engine=engine)
        return self.head(x, labels, denominator=denominator)


def batch(rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(rank)
    labels = torch.randint(0, VOCAB, (TOKENS,), generator=generator)
    labels[: 1000 * (rank + 1)] = -100
    return torch.randn(TOKENS, HIDDEN, generator=generator), labels


def denominator() -> torch.Tensor:
    return torch.tensor(float(sum((batch(rank)[1] >= 0).sum() for rank in range(2))))


def single() -> dict[str, torch.Tensor]:
    model = Model()
    for rank in range(2):
        model(*batch(rank), denominator(), None).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def sharded_equals_single() -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2,))
    model = Model()
    expected = single()
    for module in [*model.layers, model.head]:
        fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)
    model(*batch(dist.get_rank()), denominator(), OffloadEngine(1 << 24, device="cpu")).backward()
    for name, parameter in model.named_parameters():
        # FSDP2 averages over the ranks, and the denominator is global already.
        assert torch.allclose(parameter.grad.full_tensor() * 2, expected[name], rtol=1e-4, atol=1e-6), name

    # A head and a norm that are DTensors: gathered, and the gradient returns to the shards.
    x, labels = batch(0)
    torch.manual_seed(7)
    whole = [torch.randn(VOCAB, HIDDEN).requires_grad_(), torch.ones(HIDDEN).requires_grad_()]
    sharded = [distribute_tensor(w.detach(), mesh, [Shard(0)]).requires_grad_() for w in whole]
    for head, norm in (whole, sharded):
        linear_cross_entropy(rms_norm(x, norm), head, labels, denominator=denominator()).backward()
    for plain, parts in zip(whole, sharded):
        gradient = parts.grad.redistribute(mesh, [Replicate()]).to_local()
        assert torch.allclose(gradient, plain.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.skipif(not dist.is_available(), reason="torch without torch.distributed")
def test_two_processes_equal_one():
    run_on_ranks(2, sharded_equals_single)
