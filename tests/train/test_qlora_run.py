"""Runs on a base in 4 bits: what is trained, resumed and exported."""

import shutil
import sys

import pytest
import torch

from eagle_model import EagleForConditionalGeneration, EagleProcessor
from eagle_model.lora import is_adapter, load_adapter
from eagle_model.quantized import QuantizedLinear
from eagle_train.config import ConfigError
from eagle_train.distributed.world import start_world
from eagle_train.runs.export import export, export_adapter
from eagle_train.runs.folder import open_run, resolve_dtype
from eagle_train.runs.ready import get_ready
from eagle_train.runs.train import train
from tests.support.models import tiny_model

STAGES = [
    {"name": "one", "max_tokens": 640, "steps": 2, "packs_per_step": 1, "lr": 1e-2, "train": ["connector"]},
    {
        "name": "two",
        "max_tokens": 640,
        "steps": 3,
        "packs_per_step": 1,
        "lr": 1e-2,
        "train": ["connector"],
        "parts": {"language": {"train": "lora"}},
    },
]
LOW = {"quantize": {"language": "nf4", "vision": "nf4"}}


@pytest.fixture
def start(tmp_path, tokenizer):
    tiny_model(tokenizer=tokenizer).save_pretrained(tmp_path / "start")
    tokenizer.save_pretrained(tmp_path / "start")
    return {"path": str(tmp_path / "start")} | LOW


def run(config):
    torch.set_num_threads(1)
    config = resolve_dtype(config, "cpu")
    world = start_world(config.parallel, "cpu")
    try:
        return train(get_ready(config), world).trainer
    finally:
        world.close()


def weights(model):
    return {name: getattr(tensor, "full_tensor", lambda tensor=tensor: tensor)().clone() for name, tensor in model.state_dict().items()}


@pytest.mark.integration
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_train_resume_export(colour_run_in, tmp_path, start, dtype):
    pytest.importorskip("bitsandbytes")
    options = {"model": start, "stages": STAGES, "checkpoint": {"every": 1, "keep": 9}, "parallel": {"dtype": dtype}}
    config = colour_run_in(tmp_path, **options)
    trainer = run(config)
    trained = weights(trainer.model)
    low = [name for name, module in trainer.model.named_modules() if isinstance(module, QuantizedLinear)]
    assert sum("language_model" in name for name in low) == 14
    assert any("vision_model" in name for name in low)
    changed = [name for name in trained if is_adapter(name) and name.endswith("lora_B") and trained[name].abs().max() > 0]
    assert len(changed) == 14

    # Killed after step 1 of the second stage: the codes come from the checkpoint, not from the folder that the run started from.
    for name in ("two-00000002", "two-00000003", "two-end"):
        shutil.rmtree(config.run.folder / "checkpoints" / name, ignore_errors=True)
    again = weights(run(config).model)
    assert again.keys() == trained.keys()
    for name, tensor in trained.items():
        assert torch.equal(again[name], tensor), name

    if dtype != "float32":
        return
    done = open_run(config.run.folder)
    export(done, tmp_path / "merged")
    merged = EagleForConditionalGeneration.from_pretrained(tmp_path / "merged").eval()
    batch = EagleProcessor.from_pretrained(tmp_path / "merged")(text="what color?")
    expected = trainer.model.eval()(**batch).logits
    torch.testing.assert_close(merged(**batch).logits, expected, atol=1e-5, rtol=1e-4)
    export_adapter(done, tmp_path / "adapter")
    base = EagleForConditionalGeneration.from_pretrained(tmp_path / "adapter" / "base").eval()
    load_adapter(base, tmp_path / "adapter")
    torch.testing.assert_close(base(**batch).logits, expected, atol=1e-5, rtol=1e-4)


def test_what_is_trained_in_full_is_not_rounded(colour_run):
    usual = colour_run().model.model_dump()
    with pytest.raises(ConfigError, match=r"model.quantize.language: stage one trains language in full"):
        colour_run(model=usual | {"quantize": {"language": "nf4"}})
    with pytest.raises(ConfigError, match=r"model.quantize.language"):
        colour_run(model=usual | {"quantize": {"language": "int3"}})


def test_the_missing_package_is_named(colour_run, monkeypatch):
    from eagle_train.training.build import build_model
    from eagle_train.training.model import load_run_tokenizer

    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", None)
    usual = colour_run().model.model_dump()
    config = colour_run(stages=STAGES, model=usual | {"quantize": {"language": "nf4"}})
    with pytest.raises(ConfigError, match=r"model.quantize: 4-bit weights need bitsandbytes .*pip install 'eagle-train\[qlora\]'"):
        build_model(config, load_run_tokenizer(config))
