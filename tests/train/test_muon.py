"""Muon: the orthogonalised update against singular values and a second implementation; AdamW for the rest against torch's."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from eagle_train.training import muon
from eagle_train.training.muon import Muon, orthogonalised
from tests.support.ranks import run_on_ranks


def quintic(matrix, steps):
    """The same polynomial on the singular values themselves, in float64."""
    u, s, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    s = s / s.square().sum().sqrt()
    for _ in range(steps):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return u @ torch.diag(s) @ v


@pytest.mark.parametrize("shape", [(8, 8), (5, 12), (12, 5), (1, 7)])
def test_orthogonalised_is_the_polynomial_of_the_singular_values(shape):
    torch.manual_seed(0)
    matrix = torch.randn(shape)
    torch.testing.assert_close(orthogonalised(matrix).double(), quintic(matrix, 5), atol=1e-4, rtol=1e-4)


def test_singular_values_are_near_one():
    torch.manual_seed(0)
    matrix = torch.linalg.qr(torch.randn(16, 16))[0] @ torch.diag(torch.logspace(-1, 0, 16)) @ torch.linalg.qr(torch.randn(16, 16))[0]
    values = torch.linalg.svdvals(orthogonalised(matrix))
    assert values.min() > 0.65
    assert values.max() < 1.2


def test_what_is_not_a_matrix_is_updated_as_by_adamw():
    torch.manual_seed(0)
    ours, theirs = nn.Linear(4, 3), nn.Linear(4, 3)
    theirs.load_state_dict(ours.state_dict())
    settings = {"lr": 0.01, "betas": (0.9, 0.95), "eps": 1e-8}
    groups = [{"params": list(ours.parameters()), "weight_decay": 0.1}]
    optimizers = Muon(groups, **settings), torch.optim.AdamW(theirs.parameters(), weight_decay=0.1, **settings)
    for step in range(4):
        x = torch.randn(5, 4, generator=torch.Generator().manual_seed(step))
        for model, optimizer in zip((ours, theirs), optimizers):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
    for a, b in zip(ours.parameters(), theirs.parameters()):
        torch.testing.assert_close(a, b)


def test_a_matrix_follows_the_momentum():
    """Three steps, written out."""
    torch.manual_seed(0)
    parameter = nn.Parameter(torch.randn(6, 4))
    expected, momentum = parameter.detach().clone(), torch.zeros(6, 4)
    optimizer = Muon([{"params": [parameter], "matrix": True, "weight_decay": 0.1}], lr=0.02, betas=(0.9, 0.95), eps=1e-8)
    for _ in range(3):
        gradient = torch.randn(6, 4)
        parameter.grad = gradient.clone()
        optimizer.step()
        momentum = 0.95 * momentum + 0.05 * gradient
        update = quintic(0.05 * gradient + 0.95 * momentum, 5).float() * 0.2 * 6**0.5
        expected = expected * (1 - 0.02 * 0.1) - 0.02 * update
        torch.testing.assert_close(parameter.detach(), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("elements", [1, 30, 1 << 22])
def test_matrices_of_one_shape_are_updated_together_as_each_alone(monkeypatch, elements):
    """Whatever the size of a batch, and where a parameter has no gradient."""
    torch.manual_seed(0)
    monkeypatch.setattr(muon, "BATCH_ELEMENTS", elements)
    shapes = [(3, 4), (4, 3), (3, 4), (2, 2), (3, 4), (4, 3), (3, 4)]
    together = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    alone = [nn.Parameter(one.detach().clone()) for one in together]
    settings = {"lr": 0.02, "betas": (0.9, 0.95), "eps": 1e-8}
    optimizers = [Muon([{"params": together, "matrix": True, "weight_decay": 0.1}], **settings)]
    optimizers += [Muon([{"params": [one], "matrix": True, "weight_decay": 0.1}], **settings) for one in alone]
    for step in range(3):
        for number, (one, other) in enumerate(zip(together, alone)):
            one.grad = None if (number, step) == (2, 1) else torch.randn(one.shape)
            other.grad = one.grad
        for optimizer in optimizers:
            optimizer.step()
    for one, other in zip(together, alone):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-6)


def test_many_matrices_are_orthogonalised_in_few_calls(monkeypatch):
    calls = []
    monkeypatch.setattr(muon, "orthogonalised", lambda matrices, steps: calls.append(matrices.shape) or orthogonalised(matrices, steps))
    parameters = [nn.Parameter(torch.randn(shape)) for shape in [(8, 8), (8, 4), (8, 8), (2000, 2000), (8, 8), (2000, 2000)]]
    optimizer = Muon([{"params": parameters, "matrix": True}], lr=0.02, betas=(0.9, 0.95), eps=1e-8)
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape)
    optimizer.step()
    assert calls == [(3, 8, 8), (1, 8, 4), (1, 2000, 2000), (1, 2000, 2000)]


def after_three_steps(place):
    """place: of a tensor, over ranks or not."""
    torch.manual_seed(0)
    matrices, rest = (
        [nn.Parameter(place(torch.randn(shape))) for shape in shapes] for shapes in ([(7, 5), (2, 6), (7, 5), (1, 9)], [(7,), (1,)])
    )
    groups = [{"params": matrices, "matrix": True, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.1}]
    optimizer = Muon(groups, lr=0.02, betas=(0.9, 0.95), eps=1e-8)
    for _ in range(3):
        for parameter in matrices + rest:
            parameter.grad = place(torch.randn(parameter.shape))
        optimizer.step()
    return [parameter.detach() for parameter in matrices + rest]


def differences_from_one_rank(mesh_shape):
    mesh = init_device_mesh("cpu", mesh_shape)
    placements = [Replicate()] * (len(mesh_shape) - 1) + [Shard(0)]
    sharded = after_three_steps(lambda tensor: distribute_tensor(tensor, mesh, placements))
    held = [tensor.to_local().numel() for tensor in sharded]
    whole = [tensor.full_tensor() for tensor in sharded]
    return dist.get_rank(), held, [float((one - other).abs().max()) for one, other in zip(whole, after_three_steps(lambda tensor: tensor))]


@pytest.mark.parametrize("mesh_shape", [(3,), (2, 2)])
def test_shards_are_updated_as_the_whole(mesh_shape):
    """Also where rows do not divide evenly, and a rank has none; the second mesh also replicates."""
    answers = run_on_ranks(torch.Size(mesh_shape).numel(), differences_from_one_rank, mesh_shape)
    assert any(0 in held for _, held, _ in answers)
    assert all(difference < 1e-6 for _, _, differences in answers for difference in differences), (
        answers
    )  # vectors and their rests round apart


@pytest.mark.gpu
def test_a_step_on_a_gpu_is_that_of_the_cpu_but_for_rounding():
    """The iteration runs in bfloat16 there; matrices and the rest, in groups of their own."""

    def stepped(device):
        torch.manual_seed(0)
        model = nn.Sequential(*(nn.Linear(16, 16) for _ in range(3))).to(device)
        groups = [
            {"params": [layer.weight for layer in model], "matrix": True, "weight_decay": 0.1},
            {"params": [layer.bias for layer in model], "weight_decay": 0.0},
        ]
        optimizer = Muon(groups, lr=0.02, betas=(0.9, 0.95), eps=1e-8)
        for step in range(3):
            generator = torch.Generator().manual_seed(step)
            for parameter in model.parameters():
                parameter.grad = torch.randn(parameter.shape, generator=generator).to(device)
            optimizer.step()
        return model

    for one, other in zip(stepped("cpu").parameters(), stepped("cuda").parameters()):
        torch.testing.assert_close(one, other.cpu(), atol=1e-3, rtol=0)
