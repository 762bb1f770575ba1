"""Runs with adapters: what is trained, what is saved, and what is exported."""

import pytest
import torch

from eagle_model import EagleForConditionalGeneration, EagleProcessor
from eagle_model.lora import adapters, is_adapter, load_adapter
from eagle_train.config import ConfigError
from eagle_train.distributed.world import alone, start_world
from eagle_train.runs.export import ExportError, export, export_adapter, load_trained
from eagle_train.runs.folder import open_run
from eagle_train.runs.ready import get_ready
from eagle_train.runs.train import train
from tests.support.models import tiny_model

LORA = {"language": {"train": "lora", "lr": 1e-2}, "vision": {"train": "lora"}}


def stages(*, connector=True, **first):
    return [
        {"name": "one", "max_tokens": 640, "steps": 2, "packs_per_step": 1, "lr": 1e-2, "train": ["connector"], **first},
        {"name": "two", "max_tokens": 640, "steps": 3, "packs_per_step": 1, "lr": 1e-2, "parts": LORA}
        | {"train": ["connector"] if connector else ["vision"]},
    ]


def run(config):
    torch.set_num_threads(1)
    return train(get_ready(config), start_world(config.parallel, "cpu")).trainer


def weights(model):
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def test_adapters_are_trained_saved_and_merged(colour_run, tmp_path):
    config = colour_run(stages=stages())
    trainer = run(config)
    trained = weights(trainer.model)
    first = weights(load_trained(config, trainer.tokenizer, alone("cpu"), config.run.folder / "checkpoints" / "one-end")[0])
    for name, tensor in trained.items():
        if name.startswith("mlp1."):
            continue
        assert torch.equal(tensor, first[name]) != is_adapter(name), name
    assert all(torch.count_nonzero(tensor) == 0 for name, tensor in first.items() if name.endswith("lora_B"))

    done = open_run(config.run.folder)
    export(done, tmp_path / "merged")
    merged = EagleForConditionalGeneration.from_pretrained(tmp_path / "merged").eval()
    assert not adapters(merged)
    batch = EagleProcessor.from_pretrained(tmp_path / "merged")(text="what color?")
    expected = trainer.model.eval()(**batch).logits
    torch.testing.assert_close(merged(**batch).logits, expected, atol=1e-5, rtol=1e-4)

    # The adapters alone belong to the weights without them, which this run has changed too.
    export_adapter(done, tmp_path / "adapter")
    base = EagleForConditionalGeneration.from_pretrained(tmp_path / "adapter" / "base").eval()
    assert not torch.allclose(base(**batch).logits, expected, atol=1e-3)
    load_adapter(base, tmp_path / "adapter")
    torch.testing.assert_close(base(**batch).logits, expected, atol=1e-5, rtol=1e-4)


def test_a_run_starts_from_an_adapter(colour_run_in, tmp_path, tokenizer):
    """Nothing but adapters is trained, so they belong to the folder that the run started from."""
    model = tiny_model(tokenizer=tokenizer)
    model.save_pretrained(tmp_path / "start")
    tokenizer.save_pretrained(tmp_path / "start")
    only = [{"name": "one", "max_tokens": 640, "steps": 2, "packs_per_step": 1, "lr": 1e-2, "train": ["language"], "parts": LORA}]
    settings = {"path": str(tmp_path / "start"), "lora": {"language": {"rank": 2, "alpha": 3, "targets": ["q_proj", "up_proj"]}}}
    config = colour_run_in(tmp_path, run={"name": "a"}, model=settings, stages=only)
    trained = weights(run(config).model)
    export_adapter(open_run(config.run.folder), tmp_path / "adapter")
    assert not (tmp_path / "adapter" / "base").exists()
    assert str(tmp_path / "start") in (tmp_path / "adapter" / "adapter_config.json").read_text()
    again = colour_run_in(tmp_path, run={"name": "b"}, model=settings | {"adapter": str(tmp_path / "adapter")}, stages=only)
    from eagle_train.training.build import build_model

    for name, tensor in weights(build_model(again, tokenizer)).items():
        assert torch.equal(tensor, trained[name]), name
    other = settings | {"adapter": str(tmp_path / "adapter"), "lora": {"language": {"rank": 2, "alpha": 5}}}
    with pytest.raises(ConfigError, match=r"model.adapter: .*_proj needs alpha 3; set model.lora"):
        build_model(colour_run_in(tmp_path, model=other, stages=only), tokenizer)


def test_a_merge_that_changes_the_model_is_not_written(colour_run, tmp_path, monkeypatch):
    config = colour_run(stages=stages())
    run(config)
    monkeypatch.setattr(
        "eagle_model.lora.LoraLinear.merged", lambda layer: torch.nn.Linear(layer.in_features, layer.out_features, layer.bias is not None)
    )
    with pytest.raises(ExportError, match=r"merging the adapters changes logits by .*nothing was written"):
        export(open_run(config.run.folder), tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"model": {"preset": "tiny", "lora": {"language": {"rank": 4}}}}, "model.lora.language: no stage trains language as lora"),
        ({"model": {"preset": "tiny", "adapter": "a"}}, "model.adapter: no stage trains a part as lora"),
        ({"stages": stages(parts={"connector": {"train": "frozen"}})}, "train names connector, and parts.connector.train is frozen"),
        ({"stages": stages(parts={"vision": {"lr": 1e-3}})}, "parts.vision: lr has no effect, since vision is frozen"),
        ({"stages": stages(carry_optimizer=True)}, "stages.one.carry_optimizer: the first stage has none before it"),
    ],
)
def test_settings_without_effect_are_refused(colour_run, sections, message):
    with pytest.raises(ConfigError) as caught:
        colour_run(**sections)
    assert message in str(caught.value)


def test_unknown_targets_are_refused(colour_run):
    from eagle_train.training.build import build_model
    from eagle_train.training.model import load_run_tokenizer

    usual = colour_run().model.model_dump()
    config = colour_run(stages=stages(), model=usual | {"lora": {"language": {"targets": ["gate"]}}})
    with pytest.raises(ConfigError, match=r"model.lora.language: lora target 'gate' is the name of no linear layer of language"):
        build_model(config, load_run_tokenizer(config))


@pytest.mark.parametrize("carry", [True, False])
def test_optimizer_state_carries_over(colour_run, carry):
    """Two equal stages at a constant rate, joined with their state, are one stage of twice the length, apart from the order of packs."""
    one = {"max_tokens": 640, "packs_per_step": 1, "lr": 1e-3, "schedule": "constant", "warmup_ratio": 0.0}
    config = colour_run(
        stages=[
            one | {"name": "one", "steps": 3, "train": ["connector"]},
            one | {"name": "two", "steps": 1, "train": ["connector", "language"], "carry_optimizer": carry},
        ],
        checkpoint={"every": 1},
    )
    states = {}
    from eagle_train.training.trainer import Trainer

    step = Trainer._step

    def watched(self, number, place, optimizer, *rest):
        if number == 1:
            names = {id(parameter): name for name, parameter in self.model.named_parameters()}
            states.update({names[id(p)]: float(state["step"]) for p, state in optimizer.state.items()})
        return step(self, number, place, optimizer, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_step", watched)
        run(config)
    connector = {f"mlp1.{place}" for place in ("0.weight", "0.bias", "1.weight", "1.bias", "3.weight", "3.bias")}
    assert states == (dict.fromkeys(connector, 3.0) if carry else {})
