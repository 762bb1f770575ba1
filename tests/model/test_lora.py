"""Adapters: they act on every layer that has one, whatever backward keeps; merged they are the same model; PEFT reads and writes them."""

import json

import pytest
import torch

import eagle_kernels.offload.engine
from eagle_kernels import OffloadEngine
from eagle_model.lora import adapters, add_lora, is_adapter, load_adapter, merge_checked, merge_lora, save_adapter
from tests.support.models import tiny_model
from tests.support.packs import make_pack

PARTS = ("vision", "connector", "language")


@pytest.fixture
def pack():
    ids = torch.cat([torch.full((8,), 100), torch.randint(0, 99, (20,), generator=torch.Generator().manual_seed(0))])
    tiles = torch.randint(0, 256, (2, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    return make_pack(ids, [14, 14], tiles=tiles, targets=ids.roll(-1), denominator=28.0)


def adapted(*, random=True, **options):
    model = tiny_model()
    torch.manual_seed(1)
    for part in PARTS:
        add_lora(model, part, **({"rank": 2, "alpha": 4.0} | options))
    if random:
        for name, parameter in model.named_parameters():
            if name.endswith("lora_B"):
                torch.nn.init.normal_(parameter, std=0.3)
    return model


def loss(model, pack):
    return model(pack).loss


def test_new_adapters_change_nothing(pack):
    assert torch.equal(loss(adapted(random=False), pack), loss(tiny_model(), pack))


def test_every_adapter_takes_effect(pack):
    model = adapted(random=False)
    assert len(adapters(model)) == 3 * 6 + 2 + 2 * 7
    before = loss(model, pack)
    for name, layer in adapters(model).items():
        with torch.no_grad():
            layer.lora_B.normal_(std=0.5)
            assert not torch.equal(loss(model, pack), before), name
            layer.lora_B.zero_()
    assert torch.equal(loss(model, pack), before)


def test_merged_is_the_same_model(pack):
    model = adapted().double()
    expected, names = loss(model, pack), set(adapters(model))
    assert set(merge_lora(model)) == names
    assert not adapters(model)
    torch.testing.assert_close(loss(model, pack), expected, rtol=1e-6, atol=1e-6)
    assert set(model.state_dict()) == set(tiny_model().state_dict())


def test_merging_is_checked(monkeypatch):
    assert merge_checked(adapted()) < 1e-5
    monkeypatch.setattr("eagle_model.lora.LoraLinear.scale", 7.0)
    broken = adapted()
    monkeypatch.setattr("eagle_model.lora.LoraLinear.merged", lambda layer: torch.nn.Linear(layer.in_features, layer.out_features))
    assert merge_checked(broken) > 1e-2


@pytest.mark.parametrize("mode", ["recompute", "offload"])
@pytest.mark.parametrize("trained", ["adapters", "connector adapters", "all"])
def test_gradients_do_not_depend_on_what_backward_finds(pack, monkeypatch, mode, trained):
    monkeypatch.setattr(eagle_kernels.offload.engine, "SMALLEST_BYTES", 1)

    def gradients(mode):
        model = adapted()
        for name, parameter in model.named_parameters():
            wanted = is_adapter(name) and (trained != "connector adapters" or name.startswith("mlp1."))
            parameter.requires_grad_(wanted or trained == "all")
        engine = OffloadEngine(1 << 24, device=torch.device("cpu")) if mode == "offload" else None
        model.set_activation_checkpointing(mode, engine)
        loss(model, pack).backward()
        return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}

    expected, found = gradients("keep"), gradients(mode)
    # The pooled features of a frozen layer above `select_layer` have no gradient in either.
    for name, gradient in expected.items():
        assert gradient is not None, name
        torch.testing.assert_close(found[name], gradient, msg=name)


def test_targets():
    model = tiny_model()
    assert {name.rpartition(".")[2] for name in add_lora(model, "language", rank=2, alpha=1.0, targets=["q_proj", "mlp.up_proj"])} == {
        "q_proj",
        "up_proj",
    }
    for part, target in (("language", "lm_head"), ("vision", "gate_proj"), ("language", "proj")):
        with pytest.raises(ValueError, match=rf"lora target '{target}' is the name of no linear layer of {part}; it has"):
            add_lora(tiny_model(), part, rank=2, alpha=1.0, targets=[target])
    with pytest.raises(ValueError, match="q_proj is a LoraLinear"):
        add_lora(model, "language", rank=2, alpha=1.0, targets=["q_proj"])


def test_files_round_trip(pack, tmp_path):
    model = adapted()
    save_adapter(model, tmp_path)
    again = tiny_model()
    assert set(load_adapter(again, tmp_path)) == set(adapters(model))
    assert torch.equal(loss(again, pack), loss(model, pack))
    with pytest.raises(ValueError, match=r"lora_A is \(2, .*the model's is \(3"):
        load_adapter(adapted(rank=3), tmp_path)
    with pytest.raises(ValueError, match="no adapters"):
        save_adapter(tiny_model(), tmp_path)
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    for key, value in (("use_dora", True), ("modules_to_save", ["lm_head"]), ("peft_type", "IA3"), ("bias", "all")):
        (tmp_path / "adapter_config.json").write_text(json.dumps(settings | {key: value}))
        with pytest.raises(ValueError, match=rf"{key} is .*not supported"):
            load_adapter(tiny_model(), tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=r"layers\.1\..*: the model has no such linear layer"):
        load_adapter(tiny_model(text_config={"num_hidden_layers": 1}), tmp_path)
    with pytest.raises(FileNotFoundError, match=r"has no adapter_config\.json"):
        load_adapter(tiny_model(), tmp_path / "nowhere")


@pytest.mark.integration
def test_peft_reads_ours(pack, tmp_path):
    peft = pytest.importorskip("peft")
    model = adapted()
    layer = next(iter(adapters(model).values()))
    layer.alpha = 7.0  # of one layer alone: PEFT's alpha_pattern
    save_adapter(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(tiny_model(), tmp_path)
    torch.testing.assert_close(loss(theirs, pack), loss(model, pack))


@pytest.mark.integration
@pytest.mark.parametrize("rslora", [False, True])
def test_ours_reads_peft(pack, tmp_path, rslora):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    config = peft.LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=["q_proj", "gate_proj", "fc1"],
        init_lora_weights=False,
        use_rslora=rslora,
        alpha_pattern={"fc1": 3},
    )
    theirs = peft.get_peft_model(tiny_model(), config)
    theirs.save_pretrained(tmp_path)
    ours = tiny_model()
    assert len(load_adapter(ours, tmp_path)) == 2 * 2 + 3 * 2  # q_proj is also a name of the tower
    torch.testing.assert_close(loss(ours, pack), loss(theirs, pack))
    assert not torch.allclose(loss(ours, pack), loss(tiny_model(), pack))
