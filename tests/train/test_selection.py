"""`model.activations: selective`: what is kept fits, fills, and is the same on every rank; a run with it is the run without it."""

import json
import logging
from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eagle_kernels import DecoderShape, Kept, Training, VisionShape, fill_memory, plan_memory
from eagle_kernels.offload import GIB
from eagle_train.config import dump_config
from eagle_train.distributed.world import World, alone
from eagle_train.planning.gpus import largest_plan
from eagle_train.runs.prediction import Rate, named_gpu, predict_stages
from eagle_train.runs.ready import get_ready
from eagle_train.runs.train import train
from eagle_train.training import memory, step_memory
from eagle_train.training.memory import OutOfMemory, Usage
from eagle_train.training.metrics import Metrics, same_run
from eagle_train.training.model import model_config
from eagle_train.training.selection import Selector, choose, fitting_plans, select
from eagle_train.training.step_memory import planned, stage_plan

QWEN = DecoderShape(hidden=3584, intermediate=18944, layers=28, heads=28, kv_heads=4, head_dim=128, vocab=152064)
SIGLIP = VisionShape(width=1152, intermediate=4304, layers=27, patches=120 * 1024)


@pytest.fixture
def large(make_config, tokenizer):
    """The 8B with packs of `tokens` on one GPU, AdamW's states elsewhere."""

    def make(*tokens, **model):
        usual = {"optimizer": "adamw_host", "packs_per_step": 1}
        stages = [{"name": f"{one // 1024}k", "max_tokens": one, **usual} for one in tokens or (32768,)]
        model = {"preset": "8b", "weights": "bfloat16", "activations": "selective", **model}
        if model["weights"] == "bfloat16":
            stages = [stage | {"optimizer": "adamw8bit"} for stage in stages]
        config = make_config({}, model=model, stages=stages, parallel={"dtype": "bfloat16"})
        return config, model_config(config, tokenizer)

    return make


levels = st.integers(0, 28)


@settings(max_examples=60, deadline=None)
@given(st.integers(20, 200), st.sampled_from([8192, 32768, 131072]))
def test_what_is_chosen_fits_and_one_layer_more_does_not(gib, tokens):
    def plan(kept, vision_kept):
        return plan_memory(QWEN, tokens, vision=SIGLIP, kept=kept, vision_kept=vision_kept)

    kept, vision_kept, chosen = fill_memory(plan, gib * GIB, layers=28, vision_layers=27)
    assert chosen == plan(kept, vision_kept)
    if chosen.gpu > gib * GIB:
        assert (kept, vision_kept) == (Kept(), Kept())
        return
    counts = [kept.attention, vision_kept.attention, kept.projections, kept.mlp, vision_kept.projections, vision_kept.mlp]
    limits = [28, 27, kept.attention, kept.projections, vision_kept.attention, vision_kept.projections]
    for place, (count, limit) in enumerate(zip(counts, limits)):
        if count < limit:  # the first that is not full: a layer more of it does not fit
            one = list(counts[: place + 1]) + [0] * (5 - place)
            one[place] += 1
            assert plan(Kept(one[0], one[2], one[3]), Kept(one[1], one[4], one[5])).gpu > gib * GIB
            break


@settings(max_examples=200)
@given(levels, levels, levels, st.integers(1, 28))
def test_more_kept_is_more_memory_of_the_last_layers(a, b, c, layers):
    mlp, projections, attention = sorted(min(one, layers) for one in (a, b, c))
    kept = Kept(attention, projections, mlp)
    found = [kept.level(index, layers) for index in range(layers)]
    assert found == sorted(found)
    assert [sum(level >= one for level in found) for one in (1, 2, 3)] == [attention, projections, mlp]
    plans = [plan_memory(QWEN, 8192, kept=one).gpu for one in (Kept(), Kept(attention), Kept(attention, projections), kept)]
    assert plans[1:] == sorted(plans[1:])


@pytest.mark.parametrize("wrong", [(1, 2), (2, 1, 2), (-1,), (0, 0, -1)])
def test_levels_build_on_one_another(wrong):
    with pytest.raises(ValueError, match="each must be at least 0"):
        Kept(*wrong)


def test_kept_and_offload_do_not_go_together():
    with pytest.raises(ValueError, match="do not go together"):
        plan_memory(QWEN, 1024, offload=True, kept=Kept(1))


def test_bytes_of_a_layer_by_hand():
    """8B, 32768 tokens in bfloat16; with Ulysses attention keeps exchanged queries, keys and values and both layouts of its output."""
    state, lse, qkv, gate = 32768 * 3584 * 2, 32768 * 28 * 4, 32768 * 4608 * 2, 32768 * 18944 * 2
    own = [QWEN.kept(level, 32768, 2) for level in range(4)]
    assert own == [state, 2 * state + lse, 3 * state + lse + qkv, 3 * state + lse + qkv + 2 * gate]
    exchanged = [QWEN.kept(level, 32768, 2, exchanged=True) for level in range(4)]
    assert exchanged == [state, 3 * state + lse + qkv, 4 * state + lse + qkv, 4 * state + lse + qkv + 2 * gate]
    patches = 120 * 1024
    states = [patches * (1152 * n * 2) for n in (1, 2, 6, 6)]
    extra = [0, patches * 16 * 4, patches * 16 * 4, patches * (16 * 4 + 4304 * 2)]
    assert [SIGLIP.layer_kept(level, 2) for level in range(4)] == [a + b for a, b in zip(states, extra)]


def test_short_stages_keep_more(large):
    config, described = large(32768, 65536)
    selector = Selector(config, alone("cpu"), lambda _: Usage(140 * GIB, 139 * GIB, 0))
    short, long = (selector.select(stage, described) for stage in config.stages)
    assert short.kept == Kept(28, 28, short.kept.mlp)
    assert short.kept.mlp > 0
    assert long.kept.mlp < short.kept.mlp
    for chosen in (short, long):
        assert chosen.plan.gpu <= chosen.room == largest_plan(139) * GIB
    for stage, chosen in zip(config.stages, (short, long)):
        alone_ = config.replaced(stages=[stage])
        assert chosen.plan == stage_plan(alone_, alone_.stages[0], described, 1, **chosen.options)
    assert f"decoder: attention 28, projections 28, mlp {short.kept.mlp} of 28 layers" in short.text
    assert f"planned {short.plan.gpu / GIB:.1f} of {short.room / GIB:.1f} GiB" in short.text


def test_a_frozen_tower_keeps_nothing(large):
    config, described = large()
    frozen = config.replaced(stages=[config.stages[0].replaced(train=["connector", "language"])])
    chosen = select(frozen, frozen.stages[0], described, 1, 139 * GIB)
    assert (chosen.vision_layers, chosen.vision_kept) == (0, Kept())
    assert chosen.kept.mlp >= select(config, config.stages[0], described, 1, 139 * GIB).kept.mlp
    assert "vision" not in chosen.text


def test_the_fullest_gpu_and_the_limit_decide(large):
    config, _ = large()

    class Two(World):
        def gather(self, value):
            return [value, Usage(80 * GIB, 60 * GIB, 0)]

    world = Two(0, 2, torch.device("cpu"), 0, 2, alone("cpu").context, None)
    look = lambda _: Usage(80 * GIB, 79 * GIB, 0)
    assert Selector(config, world, look).room == largest_plan(60) * GIB
    assert Selector(config, alone("cpu"), look).room == largest_plan(79) * GIB
    limited, _ = large(gpu_memory=40.5)
    assert Selector(limited, world, look).room == 40.5 * GIB
    assert Selector(config, alone("cpu"), lambda _: None).room is None


def test_groups_of_tiles_leave_the_decoder_more(large):
    """On one rank: several would gather the tower for every group. Deterministic runs may not have other sums."""
    for weights in ("float32", "bfloat16"):
        config, described = large(weights=weights)
        least = stage_plan(config, config.stages[0], described, 1).gpu
        few = select(config, config.stages[0], described, 1, least - 2 * GIB)
        assert few.vision_group in step_memory.GROUPS
        assert few.plan == stage_plan(config, config.stages[0], described, 1, **few.options)
        assert few.plan.gpu <= least - 2 * GIB
        assert f"vision tower: pixels, run again for {few.vision_group} tiles at a time" in few.text
        assert planned(config, described, 1).gpu < least - 2 * GIB
        assert select(config, config.stages[0], described, 1, 400 * GIB).vision_group is None
        fixed = config.replaced(run=config.run.replaced(deterministic=True))
        for other, ranks in ((fixed, 1), (config, 2)):
            room = stage_plan(other, other.stages[0], described, ranks).gpu - 2 * GIB
            assert select(other, other.stages[0], described, ranks, room).vision_group is None


def test_larger_groups_where_they_cost_nothing(large):
    config, described = large(131072)
    found = select(config, config.stages[0], described, 1, 100 * GIB)
    assert found.vision_group == 32


def test_mlps_in_blocks_of_tokens_leave_long_packs_more(large):
    config, described = large(131072)
    stage, room = config.stages[0], 128 * GIB
    found = select(config, stage, described, 2, room)
    assert (found.mlp_rows, found.vision_group) == (32768, None)
    assert "MLPs on 32768 tokens at a time" in found.text
    assert found.plan == stage_plan(config, stage, described, 2, **found.options)
    assert found.plan.gpu <= room
    whole = stage_plan(config, stage, described, 2, **(found.options | {"mlp_rows": None}))
    assert whole.gpu > room
    fixed = config.replaced(run=config.run.replaced(deterministic=True))
    for other in (fixed, large(32768)[0]):
        assert select(other, other.stages[0], described, 2, room).mlp_rows is None


@pytest.mark.parametrize(
    ("change", "blocks"),
    [
        ({}, True),
        ({"mlp_bias": True}, False),
        ({"training": Training("lora", rank=8)}, False),
        ({"training": Training("lora", rank=8, targets=("q_proj", "v_proj"))}, True),
        ({"training": Training("full", rank=8, targets=("down_proj",))}, False),
        ({"training": Training("frozen")}, True),
        ({"training": Training("frozen", quantized=True)}, False),
    ],
)
def test_blocks_only_where_the_fused_operator_runs(change, blocks):
    shape = replace(QWEN, **change)
    assert shape.mlp_in_blocks is blocks
    whole, parts = (plan_memory(shape, 131072, mlp_rows=rows).gpu for rows in (None, 32768))
    assert (parts < whole) is blocks


def with_activations(colour_run, name, **model):
    return colour_run(run={"name": name, "deterministic": True}, model={**colour_run().model.model_dump(), **model})


def trained(config, **options):
    torch.set_num_threads(1)
    trainer = train(get_ready(config), alone("cpu"), **options).trainer
    records = same_run(Metrics(config.run.folder / "metrics.jsonl"))
    return trainer, [(record["loss"], record["grad_norm"]) for record in records if record["kind"] == "step"]


def test_a_limit_chooses_for_every_stage_and_the_run_is_the_same(colour_run, caplog):
    config = with_activations(colour_run, "kept", activations="keep")
    _, expected = trained(config)
    described = model_config(config, get_ready(config).tokenizer)
    selective = with_activations(colour_run, "selective", activations="selective")
    least, most = (select(selective, selective.stages[-1], described, 1, room).plan.gpu for room in (0, None))
    assert least < most
    limit = (least + 0.4 * (most - least)) / GIB
    with caplog.at_level(logging.INFO, "eagle_train.training.trainer"):
        trainer, found = trained(with_activations(colour_run, "limited", activations="selective", gpu_memory=limit))
    assert found == expected
    chosen = trainer.selection
    assert Kept() != chosen.kept != Kept.all(2)
    levels = [layer.kept for layer in trainer.model.language_model.model.layers]
    assert levels == [chosen.kept.level(index, 2) for index in range(2)]
    lines = [record.message for record in caplog.records if "kept for backward" in record.message]
    assert [line.partition(":")[0] for line in lines] == [f"stage {stage.name}" for stage in config.stages]
    steps = [record for record in Metrics(trainer.folder / "metrics.jsonl") if record["kind"] == "step"]
    assert trainer.model.vision_group is None
    assert steps[-1]["memory_planned"] == chosen.plan.gpu <= limit * GIB


def test_a_run_with_groups_of_tiles(colour_run, monkeypatch):
    monkeypatch.setattr(step_memory, "GROUPS", (2,))
    found = {}
    for mode in ("keep", "selective"):
        config = with_activations(colour_run, f"grouped-{mode}", activations=mode, gpu_memory=1e-6)
        config = config.replaced(stages=config.stages[:1], run=config.run.replaced(deterministic=False))
        trainer, found[mode] = trained(config)
    assert trainer.selection.vision_group == trainer.model.vision_group == 2
    for one, other in zip(found["keep"], found["selective"]):
        assert one == pytest.approx(other, rel=1e-3)


def test_running_out_of_memory_names_a_lower_limit(large, monkeypatch):
    """torch held 10 % more than was planned."""
    config, described = large()
    chosen = select(config, config.stages[0], described, 1, 130 * GIB)
    held = int(chosen.plan.gpu * 1.1)
    monkeypatch.setattr(memory, "usage", lambda _: Usage(140 * GIB, held, held))
    options = {"stage": config.stages[0], "step": 1, "doing": "forward/backward of pack 1 of 1", "selection": chosen}
    with pytest.raises(OutOfMemory, match=r"The smallest change that helps: model.gpu_memory: ([\d.]+) ") as caught:
        with memory.explained(config, described, alone("cpu"), **options):
            raise torch.OutOfMemoryError("CUDA out of memory")
    limit = float(str(caught.value).partition("gpu_memory: ")[2].partition(" ")[0])
    lower = select(config, config.stages[0], described, 1, limit * GIB)
    assert lower.plan.gpu < chosen.plan.gpu
    assert lower.plan.gpu * 1.1 <= chosen.plan.gpu * 1.001
    assert f"{chosen.plan.gpu / GIB:.1f} GiB, the peak in " in str(caught.value)


def test_plans_print_what_a_gpu_keeps(colour_run, tmp_path, eagle_here):
    ready = get_ready(colour_run(), held_out=False)
    stages = predict_stages(ready, 1, Rate(1e12, "given"), named_gpu("h200"))
    assert all("mlp 2 of 2 layers" in stage.kept for stage in stages)
    assert all(stage.kept is None for stage in predict_stages(ready, 1, Rate(1e12, "given")))
    (tmp_path / "run.yaml").write_text(dump_config(colour_run()))
    printed = eagle_here("plan", tmp_path / "run.yaml", "--gpus", 1, "--gpu", "H200").stdout
    assert "  one: kept for backward: decoder: attention 2, projections 2, mlp 2 of 2 layers; vision tower: " in printed
    document = json.loads(eagle_here("plan", tmp_path / "run.yaml", "--gpus", 1, "--json").stdout)
    assert all(stage["kept"].startswith("kept for backward") for stage in document["prediction"]["stages"])


def test_what_fits_the_8b_forward_and_backward_in_bfloat16():
    """The table of docs/scaling.md."""
    found = {}
    for name in ("h200", "h100"):
        for tokens in (32768, 65536, 131072):
            tower = replace(SIGLIP, patches=(tokens - 2048) // 256 * 1024)
            plan = partial(plan_memory, QWEN, tokens, vision=tower, labelled=2048)
            room = largest_plan(named_gpu(name).gib) * GIB
            kept, vision_kept, chosen = fill_memory(
                lambda kept, vision_kept, plan=plan: plan(kept=kept, vision_kept=vision_kept), room, layers=28, vision_layers=27
            )
            if chosen.gpu <= room:
                found[name, tokens] = kept.attention, kept.projections, kept.mlp, vision_kept.attention
    assert found == {
        ("h200", 32768): (28, 28, 28, 27),
        ("h200", 65536): (28, 28, 3, 27),
        ("h200", 131072): (23, 0, 0, 0),
        ("h100", 32768): (28, 28, 3, 27),
        ("h100", 65536): (24, 0, 0, 0),
    }


def test_auto_is_offload_in_stages_that_do_not_fit(large):
    """The 8B with sums of gradients over packs: 32K fits an H100 with the decoder's inputs on the host, 16K without."""
    config, described = large(16384, 32768, weights="bfloat16", activations="auto")
    config = config.replaced(stages=[stage.replaced(packs_per_step=2) for stage in config.stages])
    room, gpu = largest_plan(79.1) * GIB, torch.device("cuda")
    short, long = (choose(config, stage, described, 1, room, gpu) for stage in config.stages)
    assert (short.mode, long.mode) == ("selective", "offload")
    assert long.plan.gpu <= room
    assert long.plan.host == 27 * 32768 * 3584 * 2
    assert f"decoder: inputs in host memory ({long.plan.host / GIB:.1f} GiB)" in long.text
    plans = fitting_plans(config, described, 1, room, gpu)
    assert all(plan.gpu <= room for plan in plans.values())
    assert plans["32k"].host > plans["16k"].host == 0
    fixed = config.replaced(model=config.model.replaced(activations="selective"))
    assert choose(fixed, fixed.stages[1], described, 1, room, gpu).mode == "selective"
    assert fitting_plans(fixed, described, 1, room, gpu)["32k"].gpu > room


def test_half_a_million_tokens_on_one_gpu(large):
    """An H200 of 139.8 GiB, whose host holds the inputs of 27 layers."""
    config, described = large(524288, weights="bfloat16", activations="offload")
    found = select(config, config.stages[0], described, 1, largest_plan(139.8) * GIB)
    assert (found.mlp_rows, found.vision_group) == (32768, 32)
    assert found.plan.gpu < 110 * GIB
    assert found.plan.host < 100 * GIB
