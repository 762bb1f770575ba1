"""docs/weights.md as a new user follows it: two parts to a trained, evaluated and exported model, then LoRA on top, from YAML only."""

import re
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, Qwen2Config, Qwen2ForCausalLM, SiglipVisionConfig, SiglipVisionModel
from typer.testing import CliRunner

import eagle_model
from eagle_model.tokenizer import train_tokenizer
from eagle_train.cli.app import command
from tests.support.packs import make_pack

PAGE = Path(__file__).parents[2] / "docs" / "weights.md"
SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
COLOURS = {"red": (200, 30, 30), "green": (30, 160, 60), "blue": (40, 60, 200)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, write_jsonl):
    folder = tmp_path_factory.mktemp("page")
    torch.manual_seed(0)
    SiglipVisionModel(SiglipVisionConfig(**SMALL, image_size=32, patch_size=8)).save_pretrained(folder / "parts/siglip")
    tokenizer = train_tokenizer(["What colour is this?", *COLOURS], vocab_size=320)
    text = Qwen2Config(**SMALL, vocab_size=len(tokenizer), num_key_value_heads=2)
    Qwen2ForCausalLM(text).save_pretrained(folder / "parts/language")
    tokenizer.save_pretrained(folder / "parts/language")
    rows = []
    for name, colour in COLOURS.items():
        Image.new("RGB", (32, 32), colour).save(folder / f"{name}.png")
        talk = [{"from": "human", "value": "<image>What colour is this?"}, {"from": "gpt", "value": name}]
        rows.append({"image": f"{name}.png", "conversations": talk})
    write_jsonl(folder / "rows.jsonl", rows * 4)
    write_jsonl(folder / "held_out.jsonl", rows)
    blocks = re.findall(r"^```yaml\n(.*?)^```", PAGE.read_text(), flags=re.DOTALL | re.MULTILINE)
    for name, block in zip(("first.yaml", "lora.yaml"), blocks, strict=True):
        (folder / name).write_text(block)
    return folder


def eagle(*arguments):
    torch.set_num_threads(1)
    done = CliRunner().invoke(command(), list(arguments), prog_name="eagle")
    assert done.exit_code == 0, (done.output, done.exception)
    return done.output


COMMON = ["--device", "cpu", "--set", "loader.workers=0", "--set", "data.workers=1"]


def logits(model):
    ids = torch.arange(40)
    return model(make_pack(ids, image=-1)).logits


@pytest.mark.filterwarnings("ignore")
def test_the_page(folder, monkeypatch):
    monkeypatch.chdir(folder)
    out = eagle("train", "first.yaml", *COMMON)
    assert "held_out" in out
    assert "held_out" in eagle("eval", "runs/first", "--device", "cpu")
    eagle("export", "runs/first", "exported", "--dtype", "float32")
    eagle_model.register()
    exported = AutoModelForImageTextToText.from_pretrained("exported").eval()

    eagle("train", "lora.yaml", *COMMON)
    eagle("export", "runs/second", "merged", "--dtype", "float32")
    merged = AutoModelForImageTextToText.from_pretrained("merged").eval()
    expected = logits(merged)
    assert not torch.allclose(expected, logits(exported), atol=1e-4)
    eagle("export", "runs/second", "adapter", "--adapter", "--dtype", "float32")
    peft = pytest.importorskip("peft")
    base = AutoModelForImageTextToText.from_pretrained("adapter/base").eval()
    torch.testing.assert_close(logits(base), logits(exported), atol=1e-5, rtol=1e-5)  # without images the connector has no part in it
    theirs = peft.PeftModel.from_pretrained(base, "adapter").eval()
    torch.testing.assert_close(logits(theirs), expected, atol=1e-5, rtol=1e-4)
