"""Checkpoint folders: golden names, bit-exact round trips, and what released folders may hold."""

import json
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from eagle_model import EagleConfig, EagleForConditionalGeneration, checkpoint, register
from eagle_model.checkpoint import load_checkpoint, read_tensors, save_checkpoint, weight_files

LAYER = "self_attn.k_proj self_attn.v_proj self_attn.q_proj self_attn.out_proj layer_norm1 layer_norm2 mlp.fc1 mlp.fc2"


def golden_names(vision_layers, text_layers):
    tower = "vision_model.vision_model."
    names = [tower + "embeddings.patch_embedding.weight", tower + "embeddings.patch_embedding.bias"]
    names += [tower + "embeddings.position_embedding.weight", tower + "post_layernorm.weight", tower + "post_layernorm.bias"]
    for layer in range(vision_layers):
        names += [f"{tower}encoder.layers.{layer}.{part}.{kind}" for part in LAYER.split() for kind in ("weight", "bias")]
    names += [f"mlp1.{number}.{kind}" for number in (0, 1, 3) for kind in ("weight", "bias")]
    for layer in range(text_layers):
        prefix = f"language_model.model.layers.{layer}."
        names += [f"{prefix}self_attn.{part}.{kind}" for part in ("q_proj", "k_proj", "v_proj") for kind in ("weight", "bias")]
        names += [f"{prefix}{part}.weight" for part in ("self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")]
        names += [f"{prefix}{part}.weight" for part in ("input_layernorm", "post_attention_layernorm")]
    return {*names, "language_model.model.embed_tokens.weight", "language_model.model.norm.weight"}


def equal(a, b):
    a, b = a.state_dict(), b.state_dict()
    return set(a) == set(b) and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("tied", [True, False])
def test_golden_names_and_round_trip(make_model, tmp_path, tied):
    model = make_model(text_config={"tie_word_embeddings": tied})
    model.save_pretrained(tmp_path)
    names = set(load_file(tmp_path / "model.safetensors"))
    assert names == golden_names(3, 2) | (set() if tied else {"language_model.lm_head.weight"})
    again = EagleForConditionalGeneration.from_pretrained(tmp_path)
    assert equal(model, again)
    register()
    assert equal(model, AutoModelForImageTextToText.from_pretrained(tmp_path))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_save_checkpoint_is_what_save_pretrained_writes(make_model, tmp_path, dtype):
    model = make_model().to(dtype)
    model.save_pretrained(tmp_path / "a")
    save_checkpoint(model.state_dict(), model.config, tmp_path / "b")
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    assert set(a) == set(b)
    assert all(torch.equal(a[name], b[name]) and a[name].dtype == dtype for name in a)
    assert equal(model, EagleForConditionalGeneration.from_pretrained(tmp_path / "b", dtype=dtype))


def test_save_checkpoint_in_another_dtype(make_model, tmp_path):
    model = make_model()
    save_checkpoint(model.state_dict(), model.config, tmp_path, dtype=torch.bfloat16)
    again = EagleForConditionalGeneration.from_pretrained(tmp_path)
    assert again.dtype == torch.bfloat16
    assert equal(model.to(torch.bfloat16), again)


def test_shards(make_model, tmp_path):
    model = make_model()
    save_checkpoint(model.state_dict(), model.config, tmp_path, max_shard_bytes=60_000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 2
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert index["metadata"]["total_size"] == sum(4 * p.numel() for p in model.parameters())
    assert equal(model, EagleForConditionalGeneration.from_pretrained(tmp_path))
    (tmp_path / files[1]).unlink()
    with pytest.raises(FileNotFoundError, match=files[1]):
        weight_files(tmp_path)


@pytest.mark.parametrize(("before", "after"), [(60_000, 10**9), (10**9, 60_000), (30_000, 60_000)])
def test_a_used_folder_is_replaced(make_model, tmp_path, before, after):
    old, new = make_model(seed=1), make_model(seed=2)
    save_checkpoint(old.state_dict(), old.config, tmp_path / "used", max_shard_bytes=before)
    (tmp_path / "used/notes.safetensors").touch()
    for folder in ("used", "fresh"):
        save_checkpoint(new.state_dict(), new.config, tmp_path / folder, max_shard_bytes=after)
        assert equal(new, EagleForConditionalGeneration.from_pretrained(tmp_path / folder))
        load_checkpoint(old, tmp_path / folder)
        assert equal(new, old)
    used, fresh = ({path.name for path in (tmp_path / folder).iterdir()} for folder in ("used", "fresh"))
    assert used == fresh | {"notes.safetensors"}


@pytest.mark.parametrize("after", [60_000, 10**9])
def test_an_interrupted_rewrite_is_no_mix(make_model, tmp_path, monkeypatch, after):
    """Interrupted while it writes, the old checkpoint stays; interrupted later, none or the new one is there, and the next try works."""
    old, new = make_model(seed=1), make_model(seed=2)

    def interrupt(owner, name, number):
        save_checkpoint(old.state_dict(), old.config, tmp_path, max_shard_bytes=60_000)
        real, calls = getattr(owner, name), []

        def counted(*args, **kwargs):
            calls.append(args)
            if len(calls) == number:
                raise OSError("disk full")
            return real(*args, **kwargs)

        with monkeypatch.context() as patch, suppress(OSError):
            patch.setattr(owner, name, counted)
            save_checkpoint(new.state_dict(), new.config, tmp_path, max_shard_bytes=after)
        found = make_model(seed=3)
        try:
            load_checkpoint(found, tmp_path)
        except FileNotFoundError:
            return "none", len(calls) < number
        return "old" if equal(found, old) else "new" if equal(found, new) else "mix", len(calls) < number

    assert interrupt(checkpoint, "save_file", 1) == ("old", False)
    assert not (tmp_path / "checkpoint.incomplete").exists()
    number, done = 0, False
    while not done:
        number += 1
        state, done = interrupt(Path, "replace", number)
        assert state == ("new" if done else "none")
    assert number > 2


def test_without_a_head_is_tied(make_model, tmp_path):
    model = make_model(text_config={"tie_word_embeddings": True})
    model.save_pretrained(tmp_path / "inner")
    file = tmp_path / "inner/config.json"
    config = json.loads(file.read_text())
    config["tie_word_embeddings"] = config["text_config"]["tie_word_embeddings"] = False
    file.write_text(json.dumps(config))
    loaded = make_model(EagleConfig.from_pretrained(tmp_path / "inner"))
    assert loaded.get_output_embeddings().weight is not loaded.get_input_embeddings().weight
    load_checkpoint(loaded, tmp_path / "inner")
    for again in (loaded, EagleForConditionalGeneration.from_pretrained(tmp_path, subfolder="inner")):
        assert equal(model, again)
        assert again.get_output_embeddings().weight is again.get_input_embeddings().weight
        assert again.config.tie_word_embeddings
        assert again.config.text_config.tie_word_embeddings
    loaded.save_pretrained(tmp_path / "again")
    assert set(weight_files(tmp_path / "again")) == golden_names(3, 2)


def test_a_head_of_its_own_is_not_dropped(make_model, tmp_path):
    model = make_model(text_config={"tie_word_embeddings": False})
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"lm_head.*tie_word_embeddings"):
        load_checkpoint(make_model(), tmp_path)
    with torch.no_grad():
        model.get_output_embeddings().weight.copy_(model.get_input_embeddings().weight)
    model.save_pretrained(tmp_path)
    tied = make_model(seed=1)
    load_checkpoint(tied, tmp_path)
    assert equal(model, tied)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("stated", ["top", "inside", "nowhere"])
def test_released_like_folder(make_model, make_config, tmp_path, tied, stated):
    """`llm_config`, a pooling head, shards, bfloat16, `select_layer` absent, and no head when it is tied, stated in one place or none."""
    model = make_model(make_config(select_layer=-2, text_config={"tie_word_embeddings": tied})).to(torch.bfloat16)
    save_checkpoint(model.state_dict(), model.config, tmp_path, max_shard_bytes=40_000)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    config["llm_config"] = config.pop("text_config")
    config["auto_map"] = {"AutoConfig": "configuration_eagle2_5_vl.Eagle2_5_VLConfig"}
    config["vision_config"].pop("vision_use_head")
    for part in (config, config["llm_config"]):
        part.pop("tie_word_embeddings", None)
    if stated != "nowhere":
        (config if stated == "top" else config["llm_config"])["tie_word_embeddings"] = tied
    config["llm_config"].pop("rope_parameters")
    config["llm_config"] |= {"sliding_window": 131072, "use_sliding_window": False}
    for name in ("downsample_ratio", "mlp_connector_layers", "loss_version", "min_dynamic_patch", "max_dynamic_patch"):
        config.pop(name)
    file.write_text(json.dumps(config))
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    pooling = {
        "vision_model.vision_model.head.probe": torch.zeros(1, 1, 32),
        "vision_model.vision_model.head.attention.in_proj_weight": torch.zeros(96, 32),
    }
    save_file(pooling, tmp_path / "pooling.safetensors", metadata={"format": "pt"})
    index["weight_map"] |= dict.fromkeys(pooling, "pooling.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))

    again, info = EagleForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert again.dtype == torch.bfloat16
    assert equal(model, again)
    assert again.config.tie_word_embeddings is tied
    assert again.config.select_layer == -2
    # And written again it is clean.
    again.save_pretrained(tmp_path / "again")
    assert set(weight_files(tmp_path / "again")) == golden_names(3, 2) | (set() if tied else {"language_model.lm_head.weight"})
    assert all(".head." not in name for name, _ in read_tensors(tmp_path))


def test_load_checkpoint_into_a_model(make_model, tmp_path):
    model, other = make_model(seed=1), make_model(seed=2)
    assert not equal(model, other)
    model.save_pretrained(tmp_path)
    load_checkpoint(other, tmp_path)
    assert equal(model, other)
    with pytest.raises(ValueError, match=r"up_proj.*expected"):
        load_checkpoint(make_model(text_config={"intermediate_size": 80}), tmp_path)
    with pytest.raises(ValueError, match=r"layers\.2.*missing"):
        load_checkpoint(make_model(text_config={"num_hidden_layers": 3}), tmp_path)
    with pytest.raises(FileNotFoundError, match="checkpoint folder"):
        load_checkpoint(model, tmp_path / "nothing")
