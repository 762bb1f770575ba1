"""GPU memory: what cannot fit is refused before anything is loaded, and what ran out after all is explained with the change that helps."""

import re

import pytest
import torch

from eagle_kernels.offload import GIB
from eagle_train.config import ConfigError
from eagle_train.distributed.world import World, alone
from eagle_train.runs.ready import get_ready
from eagle_train.runs.train import train
from eagle_train.training import memory
from eagle_train.training.memory import OutOfMemory, Usage, changes, check_host_memory, check_memory, smallest_change
from eagle_train.training.model import model_config
from eagle_train.training.step_memory import planned


@pytest.fixture
def large(make_config, tokenizer):
    """The 8B at 32K on one GPU, as configured by default."""

    def make(**sections):
        stages = [{"name": "32k", "max_tokens": "32K", **sections.pop("stage", {})}]
        model = {"preset": "8b", "activations": "recompute", **sections.pop("model", {})}
        config = make_config({}, model=model, stages=stages, parallel={"dtype": "bfloat16", **sections.pop("parallel", {})})
        return config, model_config(config, tokenizer)

    return make


def a_card(total, free=None):
    return lambda device: Usage(int(total * GIB), int((total if free is None else free) * GIB), 0)


def test_what_cannot_fit_is_refused_with_the_smallest_change(large):
    config, described = large()
    need = planned(config, described, 1).gpu
    plan = check_memory(config, described, alone("cpu"), look=a_card(need / GIB + 1))
    assert plan.gpu == need
    with pytest.raises(ConfigError) as caught:
        check_memory(config, described, alone("cpu"), look=a_card(80))
    text = str(caught.value)
    assert re.search(rf"^stages.32k: a pack of 32768 tokens cannot fit: a step is planned to need {need / GIB:.1f} GiB, the peak in ", text)
    assert "the GPU of rank 0 has 80.0 GiB." in text
    named = re.search(r"The smallest change that helps: (.*) \(planned: ([\d.]+) GiB\)", text)
    assert float(named[2]) <= 80


@pytest.mark.parametrize("activations", ["recompute", "selective"])
def test_a_limit_of_the_configuration_that_cannot_be_met_is_refused(large, activations):
    config, described = large(model={"activations": activations})
    need = planned(config, described, 1).gpu / GIB
    within, _ = large(model={"activations": activations, "gpu_memory": need + 0.1})
    assert check_memory(within, described, alone("cpu"), look=a_card(500)).gpu <= (need + 0.1) * GIB
    beyond, _ = large(model={"activations": activations, "gpu_memory": need - 5})
    message = rf"model.gpu_memory: [\d.]+ GiB are too few for stages.32k: .* need at least {need:.1f} GiB.* or the smallest"
    with pytest.raises(ConfigError, match=message):
        check_memory(beyond, described, alone("cpu"), look=a_card(500))


def test_changes_need_less_and_the_first_that_fits_is_named(large):
    config, described = large(stage={"max_tokens": "128K"})
    need = planned(config, described, 8).gpu
    found = list(changes(config, described, 8))
    assert [change.text for change in found[:5]] == [
        "model.activations: offload",
        "stages.*.optimizer: adamw_host (its states in host memory)",
        "stages.*.optimizer: adamw8bit (needs torchao)",
        "stages.*.optimizer: adamw8bit (needs torchao), model.weights: bfloat16",
        "parallel.all_gather: 2 (packs shared by 2 GPUs)",
    ]
    texts = [change.text for change in found]
    both = "model.activations: offload and stages.*.optimizer: adamw8bit (needs torchao), model.weights: bfloat16"
    assert texts.index("16 GPUs instead of 8") < texts.index(both) < texts.index("stages.*.max_tokens: at most 65536")
    assert all(change.plan.gpu <= need for change in found)
    for change in found:
        first = next(one for one in found if one.plan.gpu <= change.plan.gpu)
        assert first.text in smallest_change(config, described, 8, change.plan.gpu)
    assert "choose a smaller model" in smallest_change(config, described, 8, GIB)


def test_memory_of_other_processes_is_named(large):
    config, described = large()
    with pytest.raises(ConfigError, match=r"has 200.0 GiB, 180.0 GiB of which are taken by other processes"):
        check_memory(config, described, alone("cpu"), look=a_card(200, free=20))


def test_the_fullest_card_of_all_ranks_counts(large):
    config, described = large()

    class Two(World):
        def gather(self, value):
            return [value, a_card(80, free=1)(None)]

    world = Two(0, 2, torch.device("cpu"), 0, 2, alone("cpu").context, None)
    with pytest.raises(ConfigError, match=r"the GPU of rank 1 has 80.0 GiB"):
        check_memory(config, described, world, look=a_card(500))


def test_without_a_gpu_nothing_is_refused(large):
    assert check_memory(*large(), alone("cpu")) is None


def test_a_host_with_too_little_memory_is_refused(large):
    """8 billion parameters, AdamW in host memory on one rank: 64 GB of states, and 96 GB of a checkpoint's copy."""
    config, _ = large(stage={"optimizer": "adamw_host"})
    count = 8 * 10**9
    check_host_memory(config, count, count, alone("cpu"), available=161 * 10**9)
    with pytest.raises(ConfigError, match=r"can spare 149.0 GiB and its 1 ranks need 149.0: 59.6 for .* and 89.4 for .*background: false$"):
        check_host_memory(config, count, count, alone("cpu"), available=16 * 10**10 - 1)
    with pytest.raises(ConfigError, match=r"The smallest change that helps: stages.*adamw8bit"):
        check_host_memory(config, count, count, alone("cpu"), available=60 * 10**9)
    waiting = config.replaced(checkpoint=config.checkpoint.replaced(background=False))
    check_host_memory(waiting, count, count, alone("cpu"), available=64 * 10**9)


def run_out(*_, **__):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")


def test_an_out_of_memory_error_names_stage_pack_plan_and_change(colour_run, monkeypatch):
    """A fake one, in the second step's first pack."""
    from eagle_train.training.trainer import Trainer

    torch.set_num_threads(1)
    config = colour_run()
    ready, calls, own = get_ready(config), [], Trainer._forward_backward

    def second(trainer, pack, sources):
        calls.append(pack)
        return run_out() if len(calls) == 3 else own(trainer, pack, sources)

    monkeypatch.setattr(Trainer, "_forward_backward", second)
    with pytest.raises(OutOfMemory) as caught:
        train(ready, alone("cpu"))
    text = str(caught.value)
    for part in (
        "stage one step 2: out of GPU memory on rank 0 in forward/backward of pack 1 of 2 (",
        " tiles; samples rows:",
        "The plan of its longest pack: ",
        "The smallest change that helps: model.activations: ",
        "The same command continues from the newest checkpoint",
        "torch: CUDA out of memory. Tried to allocate 2.00 GiB.",
    ):
        assert part in text, text
    assert "more" not in text.rpartition("torch: ")[2]
    assert isinstance(caught.value.__cause__, torch.OutOfMemoryError)


def test_a_plan_that_was_too_low_is_scaled(large, monkeypatch):
    """The card held twice what was planned: a change must be planned at half of what is free."""
    config, described = large(stage={"max_tokens": "128K"})
    need = planned(config, described, 1).gpu
    monkeypatch.setattr(memory, "usage", lambda device: Usage(2 * need, 2 * need, 2 * need))
    with (
        pytest.raises(OutOfMemory) as caught,
        memory.explained(config, described, alone("cpu"), stage=config.stages[0], step=1, doing="the optimizer's step"),
    ):
        run_out()
    assert f"The card has {2 * need / GIB:.1f} GiB, torch held {2 * need / GIB:.1f}" in str(caught.value)
    expected = smallest_change(config, described, 1, need)
    assert expected in str(caught.value)
