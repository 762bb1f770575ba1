"""Folders in the released layout, with every variation that released files are known to have: trained, exported, and chatted with."""

import json
import shutil

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from eagle_model import EagleForConditionalGeneration, EagleProcessor
from eagle_model.checkpoint import save_checkpoint
from eagle_train.distributed.world import start_world
from eagle_train.runs.chat import Chat
from eagle_train.runs.export import export
from eagle_train.runs.folder import open_run
from eagle_train.runs.ready import get_ready
from eagle_train.runs.train import train
from tests.support.models import tiny_model

VARIATIONS = ("plain", "older", "tied-nowhere", "untied-inside", "layer-4", "other-ids")


@pytest.fixture
def released(tmp_path, tokenizer):
    """A function that writes a folder with one of the variations."""

    def write(variation):
        changes = {"text_config": {"tie_word_embeddings": variation != "untied-inside"}}
        if variation == "layer-4":
            changes["select_layer"] = -4
        model = tiny_model(tokenizer=tokenizer, **changes).to(torch.bfloat16)
        folder = tmp_path / "released"
        save_checkpoint(model.state_dict(), model.config, folder, max_shard_bytes=60_000 if variation == "older" else 10**9)
        tokenizer.save_pretrained(folder)
        file = folder / "config.json"
        config = json.loads(file.read_text())
        if variation == "older":
            _older(folder, config)
        if variation == "tied-nowhere":
            for part in (config, config["text_config"]):
                part.pop("tie_word_embeddings", None)
        if variation == "untied-inside":
            config.pop("tie_word_embeddings", None)
        if variation == "layer-4":
            config.pop("select_layer")
        if variation == "other-ids":  # the base tokenizer's end token, and an image token of another tokenizer
            config["text_config"]["eos_token_id"], config["image_token_index"] = 0, 1
        file.write_text(json.dumps(config))
        return folder

    return write


def _older(folder, config):
    config["llm_config"] = config.pop("text_config")
    config["_attn_implementation"] = config["llm_config"]["_attn_implementation"] = "flash_attention_2"
    config["auto_map"] = {"AutoConfig": "configuration_eagle2_5_vl.Eagle2_5_VLConfig"}
    config["llm_config"].pop("rope_parameters")
    config["llm_config"] |= {"sliding_window": 131072, "use_sliding_window": False}
    for name in ("downsample_ratio", "mlp_connector_layers", "loss_version", "min_dynamic_patch", "max_dynamic_patch"):
        config.pop(name)
    pooling = {"vision_model.vision_model.head.probe": torch.zeros(1, 1, 32)}
    save_file(pooling, folder / "pooling.safetensors", metadata={"format": "pt"})
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"] |= dict.fromkeys(pooling, "pooling.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("variation", VARIATIONS)
def test_every_variation_trains_and_serves(released, colour_run_in, tmp_path, tokenizer, variation):
    folder = released(variation)
    stages = [{"name": "s", "max_tokens": 640, "steps": 1, "packs_per_step": 1, "lr": 1e-3}]
    config = colour_run_in(tmp_path, model={"path": str(folder)}, stages=stages)
    torch.set_num_threads(1)
    trainer = train(get_ready(config), start_world(config.parallel, "cpu")).trainer
    original = EagleForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    assert trainer.model.config.select_layer == (-4 if variation == "layer-4" else -1)
    moved = (trainer.model.mlp1[1].weight - original.mlp1[1].weight).abs().max()
    assert 0 < moved < 5e-3  # one step of AdamW from the folder's weights
    shutil.rmtree(folder)
    export(open_run(config.run.folder), tmp_path / "exported")
    again = EagleForConditionalGeneration.from_pretrained(tmp_path / "exported")
    for name, tensor in trainer.model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    assert again.generation_config.eos_token_id == tokenizer.convert_tokens_to_ids("<|im_end|>")
    Image.new("RGB", (64, 40), (200, 0, 0)).save(tmp_path / "red.png")
    answers = []
    for place in (config.run.folder, tmp_path / "exported"):
        answers.append(Chat.open(place, images=[tmp_path / "red.png"], device="cpu", max_new_tokens=4).answer("<image-1>what color?"))
    assert answers[0] == answers[1]


def test_a_released_folder_chats_as_it_is(released, tmp_path):
    folder = released("older")
    Image.new("RGB", (64, 40), (200, 0, 0)).save(tmp_path / "red.png")
    Chat.open(folder, images=[tmp_path / "red.png"], device="cpu", max_new_tokens=2).answer("<image-1>what color?")
    processor = EagleProcessor.from_pretrained(folder)
    assert [processor.to_dict()[name] for name in ("max_tiles", "thumbnail")] == [12, True]
