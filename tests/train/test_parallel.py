"""Two processes over gloo with FSDP2, and two that share each pack, train what one process trains."""

import json
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from eagle_train.config import ConfigError, ParallelConfig, dump_config
from eagle_train.data.ledger import Ledger
from eagle_train.distributed.world import start_world
from eagle_train.runs.export import load_trained
from eagle_train.runs.ready import get_ready
from eagle_train.runs.train import train
from eagle_train.training.metrics import Metrics
from tests.support.ranks import free_ports, outputs_of, start_processes

CHILD = Path(__file__).with_name("train_on_ranks.py")


def train_on_ranks(paths, ranks=2):
    """The runs of some configuration files on `ranks` processes; starting those costs more than the runs, so they do all of them."""
    port, *free = free_ports(1 + len(paths))
    runs = [f"{one}:{path}" for one, path in zip(free, paths)]
    processes = start_processes([sys.executable, str(CHILD), str(port), VANISHING, *runs], ranks)
    outputs = outputs_of(processes)
    assert [process.returncode for process in processes] == [0] * ranks, outputs


def same(config, other):
    """Losses, norms and final weights agree to 1e-5."""
    records = [list(Metrics(one.run.folder / "metrics.jsonl")) for one in (config, other)]
    assert len(records[0]) == len(records[1]) > 0
    evaluations = [[record for record in some if record["kind"] == "eval"] for some in records]
    assert len(evaluations[0]) == 2
    for a, b in zip(*evaluations):
        assert a["scores"] == b["scores"]
        assert a["losses"]["held_out"] == pytest.approx(b["losses"]["held_out"], rel=1e-5)
        assert a["losses"]["held_out"]["rows"] == 24, "25 rows, one of them gone"
    records = [[record for record in some if record["kind"] == "step"] for some in records]
    for a, b in zip(*records):
        for key in ("loss", "grad_norm"):
            assert a[key] == pytest.approx(b[key], rel=1e-5), (key, a["total_step"])
        assert a["losses"] == pytest.approx(b["losses"], rel=1e-5)
        assert set(a["losses"]) <= {"rows", "half"}
        assert a["flops"] == b["flops"] > 0
        for key in ("tokens", "tiles", "samples", "missing", "labels", "seen_tokens", "fill", "lr"):
            assert a[key] == b[key]
    world = start_world(ParallelConfig(dtype="float32"), "cpu")
    ready = [(one, get_ready(one).tokenizer, world) for one in (config, other)]
    models = [load_trained(*one)[0].state_dict() for one in ready]
    if config.model.ema is not None:
        averages = [load_trained(*one, ema=True)[0].state_dict() for one in ready]
        assert any(not torch.equal(tensor, models[0][name]) for name, tensor in averages[0].items())
        models = [one | {f"average {name}": tensor for name, tensor in average.items()} for one, average in zip(models, averages)]
    for name, tensor in models[0].items():
        # Adam divides by the gradient's own size: where that is nearly zero, its sign is a matter of rounding.
        torch.testing.assert_close(models[1][name], tensor, atol=2e-5, rtol=1e-5, msg=name)


# A large epsilon: weights then depend on gradients smoothly, and can be compared at all.
STAGES = [
    {"name": "one", "max_tokens": 640, "steps": 2, "packs_per_step": 4, "lr": 1e-3, "eps": 1e-3},
    {"name": "two", "max_tokens": 1280, "steps": 1, "packs_per_step": 2, "lr": 1e-3, "eps": 1e-3, "train": ["connector", "language"]},
]
HELD_OUT = {
    "data": {
        "sources": {"rows": {"annotation": "rows.jsonl"}, "half": {"annotation": "rows.jsonl", "repeat_time": 0.5}},
        "eval_sources": {"held_out": {"annotation": "rows.jsonl"}},
        "workers": 1,
    },
    "eval": {"metrics": {"held_out": "teacher_forced"}},
}
"""Validation losses and teacher-forced scores, computed over the same ranks as training."""
#: Further stages, each trained by one process and by two with FSDP2 (lora: that share each pack): what is trained changes between stages.
VARIATIONS = {
    "lora": [STAGES[0] | {"train": ["connector"]}, STAGES[1] | {"train": ["vision"], "parts": {"language": {"train": "lora", "lr": 1e-2}}}],
    "muon": [STAGES[0] | {"optimizer": "muon"}, STAGES[1] | {"optimizer": "muon", "carry_optimizer": True}],
    "carried": [STAGES[0] | {"train": ["connector"]}, STAGES[1] | {"carry_optimizer": True, "parts": {"language": {"layer_decay": 0.5}}}],
}
#: Products of 8-bit floats. Ranks that share a pack have scales of their own for the columns of weight gradients; these are powers of 2, so
#: that only values below the range of e4m3 are rounded otherwise.
MODELS = {
    "fp8": {"fp8": {"vision": "rowwise", "connector": "rowwise", "language": "rowwise"}},
    "fp8-context": {"fp8": {"language": "rowwise"}},
}
VARIATIONS |= {
    "fp8": [STAGES[0], STAGES[1] | {"train": ["connector"], "parts": {"language": {"train": "lora", "lr": 1e-2}}}],
    "fp8-context": STAGES,
}
VANISHING = "3.png"
"""An image that is there when rows are prepared and gone when they are read: its sample is missing, whichever rank reads it."""


def train_alone(colour_run_in, folder, stages, model=None):
    """The run of one process."""
    torch.set_num_threads(1)
    model = colour_run_in(folder).model.model_dump() | (model or {})
    config = colour_run_in(folder, stages=stages, checkpoint={"every": 100}, model=model, **HELD_OUT)
    ready = get_ready(config)
    (folder / VANISHING).unlink()
    train(ready, start_world(config.parallel, "cpu"))
    return config


@pytest.fixture(scope="module")
def alone(colour_run_in, tmp_path_factory):
    return train_alone(colour_run_in, tmp_path_factory.mktemp("alone"), STAGES)


#: The split of every pack is chosen anew.
AUTO = {"context-auto": {"all_gather": 2, "context": "auto"}}


@pytest.fixture(scope="module")
def on_ranks(colour_run_in, tmp_path_factory):
    """The same run on two ranks, for each way of sharing it."""
    ways = {
        "fsdp2": {"fsdp": True},
        "replicated": {"fsdp": False},
        "context-parallel": {"all_gather": 2},
        **AUTO,
        "lora": {"all_gather": 2},
        "fp8-context": {"all_gather": 2},
    }
    configs, paths = {}, []
    for way in {**ways, **VARIATIONS}:
        folder, parallel = tmp_path_factory.mktemp(way), ways.get(way, {})
        sections = {"checkpoint": {"every": 100}, "parallel": {"dtype": "float32", **parallel}, **HELD_OUT}
        model = colour_run_in(folder).model.model_dump() | MODELS.get(way, {})
        configs[way] = colour_run_in(folder, stages=VARIATIONS.get(way, STAGES), model=model, **sections)
        paths.append(folder / "ranks.yaml")
        paths[-1].write_text(dump_config(configs[way]))
    train_on_ranks(paths)
    return configs


@pytest.mark.parametrize("way", ["fsdp2", "replicated", "context-parallel", "context-auto"])
def test_two_ranks_train_what_one_trains(alone, on_ranks, way):
    ranks = on_ranks[way]
    same(alone, ranks)
    assert json.loads((ranks.run.folder / "checkpoints" / "two-end" / "state.json").read_text())["total_steps"] == 3
    missing = {(entry.line, entry.reason) for name in ("", "1") for entry in Ledger(ranks.run.folder / f"ledger-train{name}.jsonl")}
    assert missing == {(4, "unreadable")}


@pytest.mark.parametrize("variation", VARIATIONS)
def test_two_ranks_train_what_one_trains_in_other_stages(on_ranks, colour_run_in, tmp_path, variation):
    alone = train_alone(colour_run_in, tmp_path, VARIATIONS[variation], MODELS.get(variation))
    same(alone, on_ranks[variation])


def test_one_process_needs_no_files_to_meet(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    start_world(ParallelConfig(dtype="bfloat16"), "cpu").close()
    assert not list(tmp_path.iterdir())


def test_ranks_that_do_not_fit_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ConfigError, match="ulysses 2 x all_gather 1 = 2 ranks don't divide the 3"):
        start_world(ParallelConfig(ulysses=2), "cpu")
    with pytest.raises(ConfigError, match=r"parallel.data is 2, but 3 ranks in groups of 1 make 3; start 2 ranks"):
        start_world(ParallelConfig(data=2), "cpu")
