"""docs/weights.md as a new user follows it, with tiny parts: every command of the page, from two parts to an adapter that PEFT loads."""

import re
import shlex
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, Qwen2Config, Qwen2ForCausalLM, SiglipVisionConfig, SiglipVisionModel
from typer.testing import CliRunner

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
        Image.new("RGB", (32, 32), colour).save(folder / "photo.png")
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
EXTRA = {"train": COMMON, "eval": COMMON[:2], "chat": COMMON[:2], "plan": COMMON[-2:]}
#: What takes long, and whose own tests have it: 4-bit weights.
LEFT_OUT = ("quantize", "4-bits")


def commands() -> list[list[str]]:
    """The commands that stand on the page, in order."""
    return [shlex.split(line)[1:] for line in re.findall(r"^    (eagle .*)$", PAGE.read_text(), flags=re.MULTILINE)]


def logits(model):
    ids = torch.arange(40)
    return model(make_pack(ids, image=-1)).logits


def python_blocks() -> list[str]:
    return re.findall(r"^```py\n(.*?)^```", PAGE.read_text(), flags=re.DOTALL | re.MULTILINE)


@pytest.mark.filterwarnings("ignore")
def test_every_command_of_the_page_runs_as_it_stands(folder, monkeypatch):
    monkeypatch.chdir(folder)
    output = {}
    for words in commands():
        if not any(part in word for part in LEFT_OUT for word in words):
            output[" ".join(words[:2])] = eagle(*words, *EXTRA.get(words[0], []))
    assert [words for words in output if words.endswith("first.yaml")] == ["plan first.yaml", "train first.yaml"]
    for words in ("train first.yaml", "eval runs/first", "train lora.yaml", "eval runs/second"):
        assert "held_out" in output[words]
    loading, peft_loading, _ = python_blocks()
    exec(compile(loading, str(PAGE), "exec"), {})
    merged, exported = (AutoModelForImageTextToText.from_pretrained(name, dtype=torch.float32).eval() for name in ("merged", "exported"))
    expected = logits(merged)
    assert not torch.allclose(expected, logits(exported), atol=1e-2)
    pytest.importorskip("peft")
    names: dict = {}
    exec(compile(peft_loading, str(PAGE), "exec"), names)
    torch.testing.assert_close(logits(names["model"].float()), expected, atol=0.02, rtol=0.02)  # both are written in bfloat16


@pytest.mark.filterwarnings("ignore")
def test_the_adapter_has_the_logits_of_the_merged_model(folder, monkeypatch):
    """In float32, without a rounding of what is merged."""
    peft = pytest.importorskip("peft")
    monkeypatch.chdir(folder)
    if not Path("runs/second/checkpoints").is_dir():
        pytest.skip("the run of the page is not there")
    eagle("export", "runs/second", "merged32", "--dtype", "float32")
    eagle("export", "runs/second", "adapter32", "--adapter", "--dtype", "float32")
    expected = logits(AutoModelForImageTextToText.from_pretrained("merged32").eval())
    base = AutoModelForImageTextToText.from_pretrained("adapter32/base").eval()
    theirs = peft.PeftModel.from_pretrained(base, "adapter32").eval()
    torch.testing.assert_close(logits(theirs), expected, atol=1e-5, rtol=1e-4)
