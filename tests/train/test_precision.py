"""`parallel.dtype: auto`: what the device computes natively, stored with the run, so that a run that continues computes the same."""

import logging
from pathlib import Path

import pytest
import torch

from eagle_train.config import ConfigError, ParallelConfig, load_config
from eagle_train.distributed import precision
from eagle_train.distributed.precision import auto_dtype, has_bfloat16
from eagle_train.distributed.world import start_world
from eagle_train.runs.folder import resolve_dtype
from eagle_train.runs.ready import get_ready
from eagle_train.runs.train import train


@pytest.fixture
def native(monkeypatch):
    """Whether the CPU computes bfloat16, as the test wants it."""

    def choose(value):
        monkeypatch.setattr(precision, "has_bfloat16", lambda device: value)

    return choose


def test_the_cpus_own_words(monkeypatch):
    """Where the kernel lists the processor's flags, torch agrees."""
    listed = Path("/proc/cpuinfo")
    if not listed.exists():
        pytest.skip("no /proc/cpuinfo")
    flags = listed.read_text().split()
    assert has_bfloat16("cpu") == bool({"avx512_bf16", "amx_bf16", "bf16"} & set(flags))
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict, raising=False)
    assert not has_bfloat16("cpu")
    assert auto_dtype("cpu") == "float32"
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    assert auto_dtype("cpu") == "bfloat16"


def test_a_run_keeps_what_it_began_with(colour_run, native):
    torch.set_num_threads(1)
    native(False)
    config = colour_run(parallel={})
    assert config.parallel.dtype == "auto"
    trainer = train(get_ready(config), start_world(config.parallel, "cpu")).trainer
    assert trainer.config.parallel.dtype == "float32"
    assert load_config(config.run.folder / "config.yaml").parallel.dtype == "float32"
    assert config.parallel.dtype == "auto"  # what was given is not changed
    native(True)
    assert resolve_dtype(config, "cpu").parallel.dtype == "float32"
    assert resolve_dtype(colour_run(run={"name": "new"}, parallel={}), "cpu").parallel.dtype == "bfloat16"
    assert "dtype" not in resolve_dtype(config, "cpu").parallel.model_fields_set


def test_a_world_of_another_precision_is_refused(colour_run, native):
    native(False)
    world = start_world(ParallelConfig(), "cpu")
    config = colour_run(parallel={"dtype": "bfloat16"})
    with pytest.raises(ConfigError, match="call resolve_dtype before start_world"):
        train(get_ready(config), world)


@pytest.mark.parametrize(("value", "dtype", "warned"), [(False, "bfloat16", 1), (True, "bfloat16", 0), (False, "float32", 0)])
def test_bfloat16_without_instructions_is_warned_of_once(colour_run, native, caplog, value, dtype, warned):
    torch.set_num_threads(1)
    native(value)
    config = colour_run(parallel={"dtype": dtype})
    world = start_world(config.parallel, "cpu")
    with caplog.at_level(logging.WARNING, "eagle_train"):
        train(get_ready(config), world)
    world.close()
    assert sum("parallel.dtype is bfloat16, for which this CPU has no instructions" in text for text in caplog.messages) == warned
