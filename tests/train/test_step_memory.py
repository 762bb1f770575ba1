"""The plan of a step's memory against the bytes of the model and the optimizer that a stage really builds."""

from importlib.util import find_spec

import pytest
import torch

from eagle_model.quantized import quantized_layers
from eagle_train.runs.ready import get_ready
from eagle_train.training.build import build_model
from eagle_train.training.ema import MovingAverage
from eagle_train.training.model import model_config
from eagle_train.training.optim import make_optimizer, set_trainable
from eagle_train.training.step_memory import averaged_parameters, planned, stage_plans, trained_parameters


def stage(name, tokens=1280, **settings):
    return {"name": name, "max_tokens": tokens, "steps": 1, "packs_per_step": 1, **settings}


ADAPTERS = {"train": "lora"}
FULL = stage("full")
WARMUP = stage("warmup", 640, train=["connector"])
LORA = stage("lora", train=["connector"], parts={"language": ADAPTERS})
BOTH = stage("both", train=["connector"], parts={"vision": ADAPTERS, "language": ADAPTERS})
TARGETED = {"lora": {"language": {"rank": 4, "targets": ["q_proj", "down_proj"]}}}
FOUR_BITS = {"quantize": {"language": "nf4"}}


def nbytes(tensors):
    return sum(tensor.nbytes for tensor in tensors)


@pytest.mark.parametrize(
    ("stages", "model"),
    [
        ([FULL], {}),
        ([WARMUP, FULL], {}),
        ([WARMUP, LORA], {}),
        ([LORA], TARGETED),
        ([BOTH, FULL], {}),
        pytest.param([WARMUP, LORA], FOUR_BITS, marks=pytest.mark.skipif(not find_spec("bitsandbytes"), reason="needs bitsandbytes")),
    ],
)
def test_bytes_are_those_of_the_model_and_the_optimizer(colour_run, stages, model):
    """Weights, gradients and optimizer states of every stage."""
    config = colour_run(model={**colour_run().model.model_dump(), **model}, stages=stages, parallel={"dtype": "float32"})
    ready = get_ready(config, held_out=False)
    described = model_config(config, ready.tokenizer)
    plans = stage_plans(config, described, 1)
    assert planned(config, described, 1).gpu == max(plan.gpu for plan in plans.values())
    for stage in config.stages:
        built = build_model(config, ready.tokenizer)
        assert set_trainable(built, stage.modes) == sum(trained_parameters(config, stage, described).values())
        optimizer = make_optimizer(built, stage)
        for parameter in built.parameters():
            parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
        optimizer.step()
        step = plans[stage.name].moments["the optimizer's step"]
        codes = [buffer for layer in quantized_layers(built).values() for buffer in layer.buffers()]
        assert step["weights"] == nbytes(built.parameters()) + nbytes(codes)
        assert step["gradients"] == nbytes(p.grad for p in built.parameters() if p.grad is not None)
        states = [value for state in optimizer.state.values() for name, value in state.items() if name != "step"]
        assert step["optimizer"] == nbytes(states)


@pytest.mark.parametrize("weights", ["float32", "bfloat16"])
def test_sums_over_packs_are_float32_and_there_from_the_second_pack_on(colour_run, weights):
    model = {**colour_run().model.model_dump(), "weights": weights}
    stages = [stage("one", optimizer="adamw"), stage("two", packs_per_step=2, optimizer="adamw")]
    config = colour_run(model=model, stages=stages, parallel={"dtype": "bfloat16"})
    described = model_config(config, get_ready(config, held_out=False).tokenizer)
    trained = sum(trained_parameters(config, config.stages[0], described).values())
    one, two = (stage_plans(config, described, 1)[name] for name in ("one", "two"))
    assert one.moments["the loss"]["gradients"] == 0
    assert two.moments["the loss"]["gradients"] == 4 * trained
    assert one.moments["the optimizer's step"]["gradients"] == (2 if weights == "bfloat16" else 4) * trained
    shared = stage_plans(config, described, 2)["two"]
    assert shared.moments["the loss"]["gradients"] == 0, "one pack for each of two ranks"
    replaced = config.replaced(stages=[config.stages[1].replaced(packs_per_step=4)])
    assert stage_plans(replaced, described, 2)["two"].moments["the loss"]["gradients"] == 4 * trained // 2, "sums are sharded"


def test_a_moving_average_is_that_of_all_stages(colour_run):
    config = colour_run(model={**colour_run().model.model_dump(), "ema": 0.9}, stages=[BOTH, FULL])
    ready = get_ready(config, held_out=False)
    described = model_config(config, ready.tokenizer)
    average = MovingAverage(build_model(config, ready.tokenizer), config, 0.9)
    assert 4 * averaged_parameters(config, described) == nbytes(average.tensors.values())
    for plan in stage_plans(config, described, 1).values():
        assert all(parts["kept"] == 4 * averaged_parameters(config, described) for parts in plan.moments.values())


def test_adapters_are_proposed_with_what_they_save(make_config, tokenizer):
    """The 8B at 32K on one card: where float32 weights fit and their gradients and states do not."""
    from eagle_train.training.memory import GIB, changes, smallest_change

    stages = [{"name": "32k", "max_tokens": "32K"}]
    parallel = {"dtype": "bfloat16", "fsdp": False}
    config = make_config({}, model={"preset": "8b", "activations": "offload"}, stages=stages, parallel=parallel)
    described = model_config(config, tokenizer)
    lora, four_bits = [change for change in changes(config, described, 1) if change.text.startswith("stages.*.parts.language.train: lora")]
    assert "model.quantize: {language: nf4} (needs bitsandbytes)" in four_bits.text
    assert four_bits.plan.gpu < lora.plan.gpu - 0.85 * 4 * 6.5e9
    assert smallest_change(config, described, 1, four_bits.plan.gpu).startswith(f"The smallest change that helps: {four_bits.text}")
    assert four_bits.plan.gpu < 40 * GIB
