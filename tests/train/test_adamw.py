"""AdamW in less memory: stochastic rounding is unbiased and repeats; the states in host memory change nothing."""

import copy
import os
from importlib.util import find_spec

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.tensor.debug import CommDebugMode

from eagle_train.config import ConfigError, ParallelConfig, StageConfig
from eagle_train.distributed.sharding import shard_model
from eagle_train.distributed.world import alone, start_world
from eagle_train.runs.export import load_trained
from eagle_train.runs.ready import get_ready
from eagle_train.runs.train import train
from eagle_train.training import adamw, checkpoint, rounding
from eagle_train.training.metrics import Metrics, same_run
from eagle_train.training.optim import OPTIMIZERS, make_optimizer
from eagle_train.training.rounding import hashed, key_of, round_into
from tests.support.interpreter import interpret
from tests.support.models import tiny_model
from tests.support.ranks import run_on_ranks
from tests.train.test_replicate import pack_of


def rounded(values, key=0, first=0):
    result = torch.empty_like(values, dtype=torch.bfloat16)
    round_into(result, values, key, first)
    return result.float()


@settings(max_examples=60, deadline=None)
@given(value=st.floats(2.0**-120, 2.0**120, width=32), sign=st.sampled_from([1, -1]), key=st.integers(0, 2**32 - 1))
def test_rounding_goes_to_a_neighbour_and_is_unbiased(value, sign, key):
    """The mean of n rounded copies is the value, within 5 standard errors of the two-valued distribution that the definition gives."""
    number = 20_000
    values = torch.full((number,), value * sign)
    found = rounded(values, key).double()
    bits = np.float32(value * sign).view(np.int32)
    below = np.int32(bits & ~0xFFFF).view(np.float32).astype(float)
    above = np.int32((bits & ~0xFFFF) + 0x10000).view(np.float32).astype(float)
    share = (bits & 0xFFFF) / 65536
    assert set(found.unique().tolist()) <= {below, above}
    error = 5 * np.sqrt(share * (1 - share) / number) * abs(above - below)
    assert abs(found.mean().item() - float(values[0])) <= error + abs(above - below) * 1e-9


def test_what_bfloat16_holds_stays_and_what_is_not_finite_too():
    exact = torch.randn(1000).bfloat16().float()
    assert torch.equal(rounded(exact), exact)
    odd = torch.tensor([0.0, -0.0, torch.inf, -torch.inf])
    assert torch.equal(rounded(odd), odd)
    assert rounded(torch.tensor([torch.nan])).isnan().all()
    assert rounded(torch.full((100,), 1e-40)).isfinite().all()


def check_rounding_kernel(device):
    """The kernel gives the bits of the torch implementation."""
    from eagle_train.training.rounding_kernel import launch

    values = torch.randn(5000) * torch.logspace(-40, 38, 5000)
    values[:4] = torch.tensor([torch.inf, -torch.inf, 0.0, -0.0])
    for key, first in ((0, 0), (0xFFFFFFFF, 7), (123456789, (5 << 32) - 2000)):
        found = torch.empty(5000, dtype=torch.bfloat16, device=device)
        launch(found, values.to(device), key, first)
        expected = torch.empty(5000, dtype=torch.bfloat16)
        round_into(expected, values, key, first)
        assert torch.equal(found.cpu().view(torch.int16), expected.view(torch.int16)), (key, first)
    launch(found, torch.full((5000,), torch.nan, device=device), 0, 0)
    assert found.isnan().all()


def test_the_kernel_rounds_to_the_same_bits():
    interpret("from tests.train.test_adamw import check_rounding_kernel; check_rounding_kernel('cpu')")


@pytest.mark.gpu
def test_the_kernel_rounds_to_the_same_bits_on_a_gpu():
    check_rounding_kernel("cuda")


def test_random_bits_are_even_and_differ_by_key_and_element():
    numbers = torch.arange(1 << 16)
    bits = hashed(numbers, 1)
    assert len(bits.unique()) > 0.999 * len(numbers), "a hash of 32 bits"
    for bit in range(32):
        share = ((bits >> bit) & 1).double().mean().item()
        assert share == pytest.approx(0.5, abs=5 * 0.5 / 256)
    assert (hashed(numbers, 2) == bits).double().mean() < 1e-3
    assert key_of("a", 1) != key_of("a", 2) != key_of("b", 2)


def test_a_shard_is_rounded_as_the_whole(monkeypatch):
    values = torch.randn(1000)
    whole = rounded(values, 7)
    monkeypatch.setattr(rounding, "CHUNK", 13)
    for start, stop in ((0, 1000), (1, 1000), (500, 731)):
        assert torch.equal(rounded(values[start:stop].clone(), 7, start), whole[start:stop])


def stage(**values):
    return StageConfig(name="s", max_tokens=640, **{"lr": 1e-2, **values})


def steps(model, optimizer, count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
        optimizer.step()
        optimizer.zero_grad()


def test_in_float32_it_is_the_usual_adamw():
    """The arithmetic without rounding, against torch's."""
    from eagle_train.training.adamw import RoundingAdamW

    model, other = tiny_model(), tiny_model()
    settings = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-8}
    ours = RoundingAdamW([{"params": list(model.parameters()), "weight_decay": 0.1}], {}, **settings)
    theirs = torch.optim.AdamW(other.parameters(), weight_decay=0.1, **settings)
    for one, optimizer in ((model, ours), (other, theirs)):
        steps(one, optimizer, 5)
    for a, b in zip(model.parameters(), other.parameters()):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


def test_updates_that_are_too_small_for_bfloat16_are_not_lost():
    """Weights of 1 and steps of 1e-4: bfloat16 has nothing between 1 and 1 - 2^-8, so rounded to the nearest it stays for ever."""
    weight = torch.nn.Parameter(torch.ones(4096, dtype=torch.bfloat16))
    model = torch.nn.Module()
    model.weight = weight
    from eagle_train.training.adamw import RoundingAdamW

    optimizer = RoundingAdamW([{"params": [weight], "weight_decay": 0.0}], {weight: "weight"}, lr=1e-4, betas=(0.9, 0.999), eps=1e-8)
    for _ in range(100):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    assert weight.float().mean().item() == pytest.approx(1 - 100 * 1e-4, abs=1e-3)


def host_states_are_adamw():
    """Four steps of both; the optimizer with states in host memory."""
    models = [tiny_model(), tiny_model()]
    optimizers = [make_optimizer(model, stage(optimizer=name)) for model, name in zip(models, ("adamw", "adamw_host"))]
    for model, optimizer in zip(models, optimizers):
        steps(model, optimizer, 4)
    for a, b in zip(*(model.parameters() for model in models)):
        assert torch.equal(a, b)
    return optimizers[1]


def test_states_in_host_memory_are_adamw_bit_for_bit():
    host_states_are_adamw()


def test_states_that_are_copied_as_for_a_gpu_are_adamw_bit_for_bit(monkeypatch):
    """The path of a GPU without one: copies stay where they are, and steps are counted apart from them."""

    class Stream:
        def wait_stream(self, _):
            pass

        def synchronize(self):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

    class Streams(adamw._Streams):
        def __init__(self, device):
            super().__init__(device)
            self.gpu, self._in, self._out = True, Stream(), Stream()

    monkeypatch.setattr(adamw, "_Streams", Streams)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda *_: Stream())
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda *_: None)
    assert {int(state["step"]) for state in host_states_are_adamw().state.values()} == {4}


@pytest.mark.parametrize(("name", "dtype"), [("adamw", torch.bfloat16), ("adamw_host", torch.float32)])
def test_a_checkpoint_gives_the_optimizer_back_bit_for_bit(tmp_path, name, dtype):
    def make(seed):
        model = tiny_model(seed=seed).to(dtype)
        return model, make_optimizer(model, stage(optimizer=name))

    model, optimizer = make(0)
    steps(model, optimizer, 3)
    path = checkpoint.write(tmp_path, checkpoint.Progress(0, "s", 3, 3, False, {}), model, optimizer, alone("cpu"))
    other, other_optimizer = make(1)
    checkpoint.read(path, other, other_optimizer, alone("cpu"))
    for parameter, theirs in zip(model.parameters(), other.parameters()):
        for key, value in optimizer.state[parameter].items():
            assert torch.equal(other_optimizer.state[theirs][key], value)
            assert other_optimizer.state[theirs][key].dtype == torch.float32
    for one, optimizer_of_it in ((model, optimizer), (other, other_optimizer)):
        steps(one, optimizer_of_it, 2, seed=1)
    for a, b in zip(model.parameters(), other.parameters()):
        assert torch.equal(a, b)


def on_rank(name, weights, folder):
    rank, size = dist.get_rank(), dist.get_world_size()
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank)}
    config = ParallelConfig(dtype="bfloat16" if weights == torch.bfloat16 else "float32")
    world = start_world(config, "cpu")

    def make(seed):
        model = shard_model(tiny_model(seed=seed).to(weights), world, config)
        return model, make_optimizer(model, stage(optimizer=name, eps=1e-3))

    model, optimizer = make(0)
    if size == 2:  # the same gradients on any number of ranks
        other, other_optimizer = make(1)
    for number in range(3):
        loss = model(pack_of(0)).loss / size
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if number == 1:
            path = checkpoint.write(folder, checkpoint.Progress(0, f"r{size}", 2, 2, False, {}), model, optimizer, world)
            checkpoint.read(path, other, other_optimizer, world)
    other(pack_of(0)).loss.div(size).backward()
    other_optimizer.step()
    same = all(torch.equal(a.to_local(), b.to_local()) for a, b in zip(model.parameters(), other.parameters()))
    return same, {key: parameter.full_tensor().detach().float().numpy() for key, parameter in model.named_parameters()}


@pytest.mark.parametrize(("name", "weights"), [("adamw", torch.bfloat16), ("adamw_host", torch.float32)])
def test_sharded_states_resume_exactly(tmp_path, name, weights):
    answers = run_on_ranks(2, on_rank, name, weights, tmp_path)
    assert all(same for same, _ in answers)
    for key, tensor in answers[0][1].items():
        assert (tensor == answers[1][1][key]).all(), key


def test_a_run_with_weights_in_bfloat16(colour_run):
    torch.set_num_threads(1)
    usual = colour_run()
    values = {"model": usual.model.model_dump() | {"weights": "bfloat16", "ema": 0.9}, "parallel": {"dtype": "bfloat16"}}
    config = colour_run(run={"name": "low"}, checkpoint={"every": 1}, **copy.deepcopy(values))
    ready = get_ready(config)
    from eagle_train.distributed.world import start_world as start

    world = start(config.parallel, "cpu")
    try:
        trainer = train(ready, world).trainer
        assert {parameter.dtype for parameter in trainer.model.parameters()} == {torch.bfloat16}
        assert all(tensor.dtype == torch.float32 for tensor in trainer.average.tensors.values())
        trained = load_trained(config, ready.tokenizer, alone("cpu"))[0]
        assert {parameter.dtype for parameter in trained.parameters()} == {torch.float32}
        records = list(same_run(Metrics(config.run.folder / "metrics.jsonl")))
        losses = [record["loss"] for record in records if record["kind"] == "step"]
        assert all(np.isfinite(losses))
    finally:
        world.close()


def test_what_does_not_go_together_is_refused(colour_run):
    low = colour_run().model.model_dump() | {"weights": "bfloat16"}
    config = colour_run(model=low)
    with pytest.raises(ConfigError, match=r"model.weights is bfloat16 and the run computes in float32: set parallel.dtype: bfloat16"):
        train(get_ready(config), alone("cpu"))
    with pytest.raises(ConfigError, match=r"stages.s.optimizer: muon does not round weights stochastically.*use adamw or adamw8bit"):
        make_optimizer(tiny_model().to(torch.bfloat16), stage(optimizer="muon"))


def collectives_of_steps():
    """Of each optimizer's step over shards, by optimizer and weights."""
    rank, size = dist.get_rank(), dist.get_world_size()
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank)}
    torch.compile = lambda function, **_: function
    found = {}
    for name in ("adamw", "adamw_host", "adamw8bit", "muon"):
        for weights in (torch.float32, torch.bfloat16):
            if (name == "adamw8bit" and find_spec("torchao") is None) or (weights == torch.bfloat16 and not OPTIMIZERS[name].bfloat16):
                continue
            config = ParallelConfig(dtype="bfloat16")
            model = shard_model(tiny_model().to(weights), start_world(config, "cpu"), config)
            optimizer = make_optimizer(model, stage(optimizer=name))
            model(pack_of(0)).loss.backward()
            with CommDebugMode() as seen:
                optimizer.step()
            found[name, str(weights)] = seen.get_total_counts()
    return found


def test_only_muon_gathers_what_ranks_hold():
    [found, _] = run_on_ranks(2, collectives_of_steps)
    assert {name for (name, _), count in found.items() if count} == {"muon"}, found
    assert len(found) >= 4


@pytest.mark.integration
def test_8_bit_states_with_weights_in_bfloat16():
    """torchao rounds stochastically too: the mean weight moves as in float32, where rounding to the nearest would not move it."""
    pytest.importorskip("torchao")
    moved = {}
    for dtype in (torch.float32, torch.bfloat16):
        model = tiny_model().to(dtype)
        layer = model.language_model.model.layers[0].mlp.up_proj.weight
        with torch.no_grad():
            layer.fill_(1.0)
        optimizer = make_optimizer(model, stage(optimizer="adamw8bit", weight_decay=0.0, lr=1e-4))
        for _ in range(20):
            layer.grad = torch.ones_like(layer)
            optimizer.step()
        moved[dtype] = 1 - layer.float().mean().item()
    assert moved[torch.bfloat16] == pytest.approx(moved[torch.float32], rel=0.1)
