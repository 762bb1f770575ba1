"""Runs with products of 8-bit floats: what they train, that ranks and policies change nothing, and where they are refused."""

import logging

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

from eagle_model import EagleForConditionalGeneration
from eagle_model.float8 import Float8Linear
from eagle_model.layers import linear_layers
from eagle_model.lora import Float8LoraLinear
from eagle_train.config import ConfigError, dump_config
from eagle_train.distributed.precision import check_fp8
from eagle_train.distributed.world import start_world
from eagle_train.runs.export import export
from eagle_train.runs.folder import open_run, resolve_dtype
from eagle_train.runs.ready import get_ready
from eagle_train.runs.train import train
from tests.support.models import tiny_model
from tests.support.runs import train_in_parts

STAGES = [{"name": "one", "max_tokens": 640, "steps": 3, "packs_per_step": 1, "lr": 1e-2}]


@pytest.fixture
def start(tmp_path, tokenizer):
    tiny_model(tokenizer=tokenizer, text_config={"hidden_size": 64}).save_pretrained(tmp_path / "start")
    tokenizer.save_pretrained(tmp_path / "start")
    return {"path": str(tmp_path / "start")}


def run(config):
    torch.set_num_threads(1)
    config = resolve_dtype(config, "cpu")
    world = start_world(config.parallel, "cpu")
    records = []
    try:
        return train(get_ready(config), world, on_record=records.append).trainer, [one["loss"] for one in records if "loss" in one]
    finally:
        world.close()


@pytest.mark.parametrize("recipe", ["rowwise", "rowwise_with_gw_hp"])
def test_train_and_export(colour_run_in, tmp_path, start, recipe, caplog):
    plain, expected = run(colour_run_in(tmp_path / "plain", model=start, stages=STAGES, parallel={"dtype": "float32"}))
    assert not any(isinstance(module, Float8Linear) for module in plain.model.modules())
    found = {}
    for activations in ("keep", "selective"):
        model = start | {"fp8": {"language": recipe}, "activations": activations}
        config = colour_run_in(tmp_path / activations, model=model, stages=STAGES, parallel={"dtype": "float32"})
        with caplog.at_level(logging.WARNING):
            trainer, found[activations] = run(config)
    assert "model.fp8 on a CPU rounds as a GPU does" in caplog.text
    layers = [name for name, module in trainer.model.named_modules() if isinstance(module, Float8Linear)]
    assert len(layers) == 14
    assert all("language_model" in name for name in layers)
    assert found["keep"] == found["selective"]
    assert found["keep"] != expected
    assert found["keep"] == pytest.approx(expected, rel=0.03)
    export(open_run(config.run.folder), tmp_path / "exported")
    assert {tensor.dtype for tensor in load_file(tmp_path / "exported" / "model.safetensors").values()} == {torch.float32}
    assert "fp8" not in (tmp_path / "exported" / "config.json").read_text()
    exported = EagleForConditionalGeneration.from_pretrained(tmp_path / "exported")
    assert not any(isinstance(module, Float8Linear) for module in exported.modules())
    theirs = AutoModelForCausalLM.from_config(exported.config.text_config)
    theirs.load_state_dict(exported.language_model.state_dict())
    ids = torch.arange(20)[None]
    torch.testing.assert_close(theirs(ids).logits, exported(ids).logits, atol=1e-5, rtol=1e-4)
    for name, tensor in trainer.model.state_dict().items():
        assert torch.allclose(exported.state_dict()[name].float(), tensor, rtol=1e-2, atol=1e-3), name


def test_the_same_in_bfloat16_with_fsdp(colour_run_in, tmp_path, start):
    """One rank in bfloat16 has the parameters of FSDP2: float32 weights, bfloat16 copies, sharded gradients."""
    found = {}
    for name, model in {"plain": start, "fp8": start | {"fp8": {"language": "rowwise", "connector": "rowwise"}}}.items():
        _, found[name] = run(colour_run_in(tmp_path / name, model=model, stages=STAGES, parallel={"dtype": "bfloat16"}))
    assert found["fp8"] != found["plain"]
    assert found["fp8"] == pytest.approx(found["plain"], rel=0.03)


def test_a_stopped_run_with_adapters_goes_on_to_the_bit(colour_run_in, tmp_path, start):
    stage = STAGES[0] | {"train": ["connector"], "parts": {"language": {"train": "lora", "lr": 1e-2}}}
    found = {}
    for name, stop_at in {"whole": None, "parts": 2}.items():
        (tmp_path / name).mkdir()
        model = start | {"fp8": {"language": "rowwise"}}
        config = colour_run_in(tmp_path / name, model=model, stages=[stage], checkpoint={"every": 1})
        trainer = train_in_parts(config, stop_at=stop_at)
        assert sum(isinstance(module, Float8LoraLinear) for module in trainer.model.modules()) == 14
        found[name] = trainer.model.state_dict()
    for name, tensor in found["whole"].items():
        assert torch.equal(found["parts"][name], tensor), name
    assert any(name.endswith("lora_B") and tensor.count_nonzero() for name, tensor in found["whole"].items())
    export(open_run(config.run.folder), tmp_path / "merged")
    merged = EagleForConditionalGeneration.from_pretrained(tmp_path / "merged")
    assert {type(layer) for layer in linear_layers(merged, "language").values()} == {nn.Linear}


def test_plan_refuses_gpus_precisions_and_sizes(colour_run, tmp_path, eagle_here):
    usual = colour_run().model.model_dump() | {"fp8": {"language": "rowwise"}}

    def plan(gpu, model=usual, dtype="auto"):
        (tmp_path / "run.yaml").write_text(dump_config(colour_run(model=model, parallel={"dtype": dtype})))
        return eagle_here("plan", tmp_path / "run.yaml", "--gpus", 1, "--gpu", gpu)

    for gpu in ("H100", "L40S"):
        assert plan(gpu).returncode == 0
    odd = usual | {"overrides": {"text_config": {"intermediate_size": 72}}}
    for done, message in (
        (plan("A100"), "model.fp8: A100 has compute capability 8.0"),
        (plan("H100", dtype="float32"), "model.fp8: the run computes in float32"),
        (plan("H100", odd), "model.fp8.language: language_model.model.layers.0.mlp.gate_proj has 128 inputs and 72 outputs"),
    ):
        assert done.returncode == 2
        assert message in done.stderr


def test_what_cannot_work_is_refused(colour_run, colour_run_in, tmp_path, start):
    usual = colour_run().model.model_dump()
    with pytest.raises(ConfigError, match=r"fp8.language: quantize keeps the weights of language in 4 bits"):
        colour_run(model=usual | {"fp8": {"language": "rowwise"}, "quantize": {"language": "nf4"}})
    with pytest.raises(ConfigError, match=r"model.fp8.language"):
        colour_run(model=usual | {"fp8": {"language": "tensorwise"}})
    with pytest.raises(ConfigError, match=r"model.fp8.head"):
        colour_run(model=usual | {"fp8": {"head": "rowwise"}})
    odd = {"fp8": {"language": "rowwise"}, "overrides": {"text_config": {"intermediate_size": 72}}, "preset": "tiny"}
    config = colour_run_in(tmp_path, model=usual | odd | {"path": None}, stages=STAGES)
    with pytest.raises(ConfigError, match=r"model.fp8.language: language_model.*72 outputs.*leave language out of model.fp8"):
        run(config)


@pytest.mark.parametrize(("capability", "dtype", "message"), [((8, 0), "bfloat16", "8.0"), ((9, 0), "float32", "parallel.dtype: bfloat16")])
def test_gpus_and_precisions_without_fp8_are_refused(colour_run, monkeypatch, capability, dtype, message):
    from eagle_kernels.ops.float8 import rounding

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "A made-up card")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    rounding._capable.cache_clear()
    try:
        config = colour_run(model=colour_run().model.model_dump() | {"fp8": {"language": "rowwise"}}, parallel={"dtype": dtype})
        with pytest.raises(ConfigError, match=f"model.fp8: .*{message}"):
            check_fp8(config, "cuda")
        check_fp8(colour_run(parallel={"dtype": dtype}), "cuda")
        check_fp8(config, "cpu")
    finally:
        rounding._capable.cache_clear()
