"""Activations kept, rebuilt, or rebuilt from host memory train the same run; bfloat16 computes, float32 remembers."""

import os

import pytest
import torch
import torch.distributed as dist

import eagle_kernels.offload.engine
from eagle_kernels.offload import GIB, Arena
from eagle_train.config import ConfigError
from eagle_train.distributed.world import start_world
from eagle_train.runs.ready import get_ready
from eagle_train.runs.train import train
from eagle_train.training import activations
from eagle_train.training.activations import activation_mode, host_bytes, make_engine
from eagle_train.training.metrics import Metrics, same_run
from eagle_train.training.model import model_config
from tests.support.ranks import run_on_ranks

MODES = ("keep", "recompute", "selective", "offload")
GPU = pytest.param("cuda", marks=pytest.mark.gpu)


@pytest.fixture(autouse=True)
def small_states_move_too(monkeypatch):
    """Hidden states of these runs are smaller than what the engine finds worth moving."""
    monkeypatch.setattr(eagle_kernels.offload.engine, "SMALLEST_BYTES", 1)


@pytest.fixture
def places(monkeypatch) -> list[int]:
    """Bytes of every place that the engine takes in its arena; copies for checkpoints have one of their own."""
    taken: list[int] = []

    class Counted(Arena):
        def take(self, nbytes: int) -> int:
            taken.append(nbytes)
            return super().take(nbytes)

    monkeypatch.setattr(eagle_kernels.offload.engine, "Arena", Counted)
    return taken


def run(config, device="cpu", on_start=None):
    torch.set_num_threads(1)
    world = start_world(config.parallel, device)
    try:
        trainer = train(get_ready(config), world, on_start=on_start).trainer
        weights = {name: whole(tensor) for name, tensor in trainer.model.state_dict().items()}
    finally:
        world.close()
    return trainer, weights


def whole(tensor):
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().cpu().clone()


def losses(config):
    return [record["loss"] for record in same_run(Metrics(config.run.folder / "metrics.jsonl"))]


def numbers(config):
    return [(record["loss"], record["grad_norm"]) for record in same_run(Metrics(config.run.folder / "metrics.jsonl"))]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_mode_trains_the_same_run(colour_run, places, dtype):
    expected, weights = None, {}
    for mode in MODES:
        config = colour_run(run={"name": mode}, model={**colour_run().model.model_dump(), "activations": mode}, parallel={"dtype": dtype})
        places.clear()
        trainer, found = run(config)
        if expected is None:
            expected, weights = numbers(config), found
            assert len(expected) == 6
        assert numbers(config) == expected, mode
        assert all(torch.equal(found[name], weights[name]) for name in weights), mode
        assert bool(places) == (mode == "offload")
        if mode == "offload":
            width = 4 if dtype == "float32" else 2
            assert max(places) <= 1280 * 32 * width
            assert len(places) >= 12  # two packs a step, six steps, one of two layers: the last one's input stays
            assert trainer.engine.arena.free == trainer.engine.arena.capacity
            assert trainer.engine.arena.capacity >= host_bytes(config, trainer.model.config)


def test_the_engine_is_made_once_although_the_model_is_made_anew(colour_run, monkeypatch):
    """With FSDP2 a stage that trains other parts starts from a fresh model; pinning again would cost minutes."""
    made = []
    monkeypatch.setattr(
        activations, "OffloadEngine", lambda *args, **kwargs: made.append(1) or eagle_kernels.OffloadEngine(*args, **kwargs)
    )
    model = {**colour_run().model.model_dump(), "activations": "offload"}
    trainer, _ = run(colour_run(model=model, parallel={"dtype": "bfloat16"}))
    assert made == [1]
    checkpoints = [layer.checkpoint.keywords["engine"] for layer in trainer.model.language_model.model.layers]
    assert checkpoints == [trainer.engine] * len(checkpoints)


def test_too_little_host_memory_is_said_with_numbers_before_the_first_step(colour_run, monkeypatch):
    config = colour_run(
        model={"preset": "8b", "tokenizer": "tokenizer", "activations": "offload"},
        stages=[{"name": "long", "max_tokens": 131072, "steps": 1, "packs_per_step": 1}],
        parallel={"dtype": "bfloat16"},
    )
    from eagle_model.presets import preset

    described = preset("8b")
    state = 131072 * 3584 * 2
    assert 27 * state <= host_bytes(config, described) <= 27 * state + (1 << 20)
    shared = config.model_copy(update={"parallel": config.parallel.model_copy(update={"ulysses": 2, "all_gather": 2})})
    assert 27 * state // 4 <= host_bytes(shared, described) <= 27 * state // 4 + (1 << 20)
    world = start_world(colour_run().parallel, "cpu")
    with pytest.raises(ConfigError, match=r"27 layers at 131072 tokens take 23.6\d GiB .* can spare 10.00 GiB; .*recompute"):
        make_engine(config, described, world, available=10 * GIB)
    # Four ranks of one host need four times as much, whichever of them checks first.
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    with pytest.raises(ConfigError, match=r"94.\d\d GiB for the 4 on the host of rank 0, which can spare 60.00 GiB"):
        make_engine(config, described, world, available=60 * GIB)


def engine_of(config, described):
    """The error of each rank where the second one may not pin memory."""
    rank = dist.get_rank()
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}
    if rank == 1:
        activations.OffloadEngine = cannot_pin
    try:
        make_engine(config, described, start_world(config.parallel, "cpu"))
    except ConfigError as error:
        return str(error)


def cannot_pin(*_, **__):
    raise MemoryError("Arena: CUDA cannot pin 3.00 GiB of host memory (error 2); raise `ulimit -l` or request less")


def test_memory_that_one_rank_cannot_pin_is_an_error_of_all(colour_run):
    config = colour_run(model=colour_run().model.model_dump() | {"activations": "offload"})
    described = model_config(config, get_ready(config, held_out=False).tokenizer)
    errors = run_on_ranks(2, engine_of, config, described)
    assert errors[0] == errors[1]
    assert errors[0].startswith("model.activations is offload: rank 1: Arena: CUDA cannot pin 3.00 GiB of host memory")


def test_auto_is_selective_on_a_gpu_and_keeps_on_a_cpu(colour_run):
    config = colour_run()
    assert activation_mode(config, torch.device("cpu")) == "keep"
    assert activation_mode(config, torch.device("cuda")) == "selective"


@pytest.mark.parametrize("device", ["cpu", GPU])
def test_bfloat16_computes_and_float32_remembers(colour_run, device):
    stages = [{"name": "only", "max_tokens": 1280, "steps": 12, "packs_per_step": 1, "lr": 1e-2}]
    seen: dict[str, set] = {"hidden": set(), "parameters": set(), "states": set()}

    def watch(trainer):
        step = torch.optim.AdamW.step

        def count_steps(optimizer, *args, **kwargs):
            result = step(optimizer, *args, **kwargs)
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    seen["parameters"].add(parameter.dtype)
                    seen["states"] |= {value.dtype for key, value in optimizer.state[parameter].items() if key != "step"}
            return result

        patch.setattr(torch.optim.AdamW, "step", count_steps)
        for layer in (*trainer.model.language_model.model.layers, *trainer.model.vision_model.vision_model.encoder.layers):
            layer.register_forward_hook(lambda module, args, output: seen["hidden"].add(output.dtype))

    found = {}
    for dtype in ("float32", "bfloat16"):
        for values in seen.values():
            values.clear()
        config = colour_run(run={"name": f"{dtype}-{device}"}, stages=stages, parallel={"dtype": dtype})
        with pytest.MonkeyPatch.context() as patch:
            run(config, device, watch)
        assert seen["hidden"] == {getattr(torch, dtype)}
        assert seen["parameters"] == seen["states"] == {torch.float32}
        found[dtype] = losses(config)
    assert found["bfloat16"][-1] < 0.75 * found["bfloat16"][0]
    assert found["bfloat16"] != found["float32"]
    assert found["bfloat16"] == pytest.approx(found["float32"], rel=0.01)


@pytest.mark.gpu
def test_every_mode_trains_the_same_run_on_a_gpu(colour_run, places):
    """Bit for bit where kernels add in one order; else to bfloat16's noise."""
    expected, weights = None, {}
    for mode in MODES:
        model = {**colour_run().model.model_dump(), "activations": mode}
        config = colour_run(run={"name": mode, "deterministic": True}, model=model, parallel={"dtype": "bfloat16"})
        _, found = run(config, "cuda")
        if expected is None:
            expected, weights = numbers(config), found
        assert numbers(config) == expected, mode
        assert all(torch.equal(found[name], weights[name]) for name in weights), mode
    assert not torch.are_deterministic_algorithms_enabled()
    assert places
    usual = colour_run(run={"name": "usual"}, parallel={"dtype": "bfloat16"})
    run(usual, "cuda")
    assert [loss for loss, _ in numbers(usual)] == pytest.approx([loss for loss, _ in expected], rel=0.01)


@pytest.mark.gpu
def test_resumed_on_a_gpu_is_the_run_that_was_not(colour_run):
    straight, broken = (
        colour_run(run={"name": name, "deterministic": True}, parallel={"dtype": "bfloat16"}) for name in ("straight", "broken")
    )
    _, weights = run(straight, "cuda")

    def stop(record):
        if record["kind"] == "step" and record["total_step"] == 4:
            raise KeyboardInterrupt

    world = start_world(broken.parallel, "cuda")
    with pytest.raises(KeyboardInterrupt):
        train(get_ready(broken), world, on_record=stop)
    world.close()
    _, resumed = run(broken, "cuda")
    assert numbers(broken) == numbers(straight)
    assert all(torch.equal(resumed[name], weights[name]) for name in weights)
