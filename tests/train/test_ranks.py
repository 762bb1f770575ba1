"""Whole runs on ranks are the run of one rank in float32: ways of sharing packs and parameters, optimizers, trained parts, precisions and
activation checkpointing, each at least once, in pairs; and runs that continue on another number of ranks.

The rows hold images of one and of many tiles, a video, text alone and questions that share an image; some images vanish before training, so
that packs lose samples, up to all of them.
"""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch.distributed as dist

import eagle_kernels.offload.engine
from eagle_train.config import parse_config
from eagle_train.distributed.world import start_world
from eagle_train.runs.ready import get_ready
from eagle_train.runs.train import train
from eagle_train.training.metrics import Metrics
from tests.support.models import byte_tokenizer
from tests.support.ranks import run_on_ranks
from tests.support.runs import colour_run_in
from tests.train.test_resume import Ended, end_after

pytestmark = pytest.mark.slow

GONE = ("3.png", "7.png", "gone.png")
SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
OVERRIDES = {"vision_config": SMALL | {"image_size": 32, "patch_size": 8}, "text_config": SMALL | {"num_key_value_heads": 2}}
LORA = {"train": "lora", "lr": 1e-2}


def stages(first=(), second=(), **both):
    """Two stages. A large epsilon: weights then depend on gradients smoothly, and can be compared at all."""
    common = {"packs_per_step": 8, "lr": 1e-3, "eps": 1e-3, **both}
    return [
        {"name": "one", "max_tokens": 640, "steps": 3, **common, **dict(first)},
        {"name": "two", "max_tokens": 1280, "steps": 2, "train": ["connector", "language"], **common, **dict(second)},
    ]


STAGES = {
    "parts": stages(),
    "thaw": stages({"train": ["connector"]}, {"train": ["vision", "connector", "language"]}),
    "vision": stages({"train": ["vision"]}, {"train": ["vision"]}, grad_clip=0.05),
    "lora": stages({"train": ["connector"]}, {"train": ["vision"], "parts": {"language": LORA}}, loss_weighting="token"),
    "muon": stages({}, {"carry_optimizer": True}, optimizer="muon"),
    "host": stages({}, {"carry_optimizer": True}, optimizer="adamw_host", loss_weighting="sample"),
    "carry": stages({"train": ["connector"]}, {"carry_optimizer": True, "parts": {"language": {"layer_decay": 0.5}}}, grad_clip=None),
}
BF16, TREES = {"dtype": "bfloat16"}, {"packing": {"share_media": True}}
#: Name, ranks, stages, parallel, model, other sections.
CASES = [
    ("replicas of shards", 8, "muon", {"replicate": 2}, {}, {}),
    ("replicated", 4, "thaw", {"fsdp": False}, {"ema": 0.9, "activations": "selective"}, {}),
    ("more ranks than rows of adapters", 8, "lora", {}, {"lora": {"language": {"rank": 3}}, "activations": "recompute"}, {}),
    ("one part", 8, "vision", {"replicate": 4}, {}, {}),
    ("all-gather, offload", 4, "host", {"all_gather": 2}, {"activations": "offload"}, {}),
    ("ulysses", 4, "thaw", {"ulysses": 4, "fsdp": False}, {"activations": "offload"}, {}),
    ("both levels", 8, "carry", {"ulysses": 2, "all_gather": 2, "replicate": 2}, {"activations": "selective"}, {}),
    ("auto, trees", 4, "parts", {"all_gather": 4, "context": "auto"}, {}, TREES),
    ("fp8", 4, "parts", {"replicate": 2}, {"fp8": {"vision": "rowwise", "language": "rowwise"}}, {}),
    ("tight memory", 2, "parts", {}, {"activations": "offload", "gpu_memory": 1e-6}, {}),
    ("bfloat16", 1, "thaw", BF16, {"activations": "offload", "gpu_memory": 1e-6}, {}),
    ("bfloat16 weights", 4, "carry", BF16 | {"replicate": 2}, {"weights": "bfloat16", "ema": 0.9}, {}),
    ("bfloat16 weights, one rank", 1, "carry", BF16, {"weights": "bfloat16"}, {}),
]
#: Name, stages, model, and processes: ranks, parallel, and steps after which they end.
CONTINUED = [
    ("other splits", "thaw", {"ema": 0.9}, [(4, {"replicate": 2}, 1), (2, {"all_gather": 2}, 3), (1, {}, None)]),
    ("muon", "muon", {}, [(1, {}, 3), (4, {"fsdp": False}, 1), (2, {"ulysses": 2}, None)]),
    ("bfloat16 weights", "carry", {"weights": "bfloat16"}, [(1, BF16, 3), (4, BF16 | {"replicate": 2}, 2), (1, BF16, None)]),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder: Path = tmp_path_factory.mktemp("ranks")
    colour_run_in(folder, byte_tokenizer(), rows=12)
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]

    def row(question, answer, **media):
        return {**media, "conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]}

    rows += [row("say " + "x" * (40 * n + 1), "yes " * (9 * n + 1)) for n in range(6)]
    rows += [
        row(f"<image>{question}", "because " * (n + 1), image=f"{n}.png") for n in range(3) for question in ("why?", "name it, in full")
    ]
    (folder / "gone.png").write_bytes((folder / "0.png").read_bytes())
    rows += [row("<image>" + "what? " * 60, "none", image="gone.png") for _ in range(3)]
    for name, some in (("rows", rows), ("held", rows[:2] + rows[12:18])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(one) + "\n" for one in some))
    for packing in ({}, TREES):
        assert get_ready(make(folder, "prepared", "parts", {}, {}, packing)).schedules
    for name in GONE:
        (folder / name).unlink()
    return folder


def make(folder, name, which, parallel, model, sections):
    return parse_config(
        {
            "run": {"name": "".join(filter(str.isalnum, name))},
            "model": {"preset": "tiny", "tokenizer": "tokenizer", "overrides": OVERRIDES, **model},
            "data": {
                "sources": {"rows": {"annotation": "rows.jsonl"}},
                "eval_sources": {"held": {"annotation": "held.jsonl"}},
                "workers": 1,
                "facts": "facts",
            },
            "eval": {"metrics": {"held": "teacher_forced"}},
            "stages": STAGES[which],
            "parallel": {"dtype": "float32", **parallel},
            "loader": {"workers": 0},
            "checkpoint": {"every": 1, "keep": 2},
            **sections,
        },
        base=folder,
    )


def on_rank(config, ends):
    """Weights and records of a run, on rank 0; None where it ends after so many steps."""
    rank, size = dist.get_rank(), dist.get_world_size()
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank)}
    eagle_kernels.offload.engine.SMALLEST_BYTES = 1  # states of this model are smaller than what is worth moving
    world = start_world(config.parallel, "cpu")
    try:
        trainer = train(get_ready(config, world), world, on_start=end_after(ends) if ends is not None else None).trainer
    except Ended:
        return None
    tensors = dict(trainer.model.named_parameters())
    if trainer.average is not None:
        tensors |= {f"average {name}": tensor for name, tensor in trainer.average.tensors.items()}
    whole = {name: (one.full_tensor() if hasattr(one, "full_tensor") else one).detach().float().numpy() for name, one in tensors.items()}
    return (whole, list(Metrics(config.run.folder / "metrics.jsonl"))) if rank == 0 else None


@pytest.fixture(scope="module")
def references(folder):
    """`reference(stages, model, sections)`: the run of one rank in float32 that keeps all activations; each is made once."""
    made = {}

    def reference(which, model, sections):
        same = {key: value for key, value in model.items() if key in ("ema", "fp8", "lora")} | {"activations": "keep"}
        key = json.dumps([which, same, sections], sort_keys=True)
        if key not in made:
            config = make(folder, f"reference{len(made)}", which, {}, same, sections)
            made[key] = run_on_ranks(1, on_rank, config, None)[0]
        return made[key]

    return reference


def compare(found, expected, dtype, weights):
    """Steps, evaluations and final weights: to rounding in float32, to that of the computation or of the weights in bfloat16."""
    low = "bfloat16" in (dtype, weights)
    tolerance, atol = (2e-2, 6e-3 if weights == "bfloat16" else 1e-4) if low else (1e-5, 2e-5)
    (tensors, records), (others, wanted) = found, expected
    assert [(one["kind"], one["total_step"]) for one in records] == [(one["kind"], one["total_step"]) for one in wanted]
    for one, other in zip(records, wanted, strict=True):
        if one["kind"] == "eval":
            assert one["losses"]["held"]["loss"] == pytest.approx(other["losses"]["held"]["loss"], rel=tolerance)
            continue
        for key in ("tokens", "tiles", "samples", "missing", "labels", "lr", "seen_tokens"):
            assert one[key] == other[key], (key, one["total_step"])
        for key in ("loss", "grad_norm"):
            assert one[key] == pytest.approx(other[key], rel=tolerance), (key, one["total_step"])
    assert tensors.keys() == others.keys()
    for name, tensor in tensors.items():
        error = np.abs(tensor - others[name])
        assert (np.sqrt(np.square(error).mean()) if low else error.max()) <= atol, name


@pytest.mark.parametrize(("ranks", "which", "parallel", "model", "sections"), [pytest.param(*case, id=name) for name, *case in CASES])
def test_ranks_train_what_one_trains(folder, references, request, ranks, which, parallel, model, sections):
    config = make(folder, request.node.name, which, parallel, model, sections)
    found = run_on_ranks(ranks, on_rank, config, None, timeout=300)[0]
    expected = references(which, model, sections)
    assert sum(record.get("missing", 0) for record in expected[1]) > 0
    compare(found, expected, config.parallel.dtype, config.model.weights)


@pytest.mark.parametrize(("which", "model", "processes"), [pytest.param(*case, id=name) for name, *case in CONTINUED])
def test_a_run_continues_on_any_number_of_ranks(folder, references, request, which, model, processes):
    for ranks, parallel, ends in processes:
        config = make(folder, request.node.name, which, parallel, model, {})
        found = run_on_ranks(ranks, on_rank, config, ends, timeout=300)[0]
    compare(found, references(which, model, {}), config.parallel.dtype, config.model.weights)
