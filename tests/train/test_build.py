"""The model of a run starts from the same weights on any number of ranks, bit for bit, whatever they come from."""

import os

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, SiglipVisionConfig, SiglipVisionModel

from eagle_model import EagleForConditionalGeneration
from eagle_model.weights import Rows
from eagle_train.distributed.sharding import shard_model
from eagle_train.distributed.world import alone, start_world
from eagle_train.training import build
from eagle_train.training.build import WeightsError, build_model, empty_model, fill_model
from eagle_train.training.model import load_run_tokenizer, model_config
from eagle_train.training.optim import set_trainable
from tests.support.models import tiny_model
from tests.support.ranks import run_on_ranks

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
LORA = [{"name": "one", "max_tokens": 640, "steps": 1, "train": ["connector"], "parts": {"language": {"train": "lora"}}}]


@pytest.fixture
def origins(colour_run_in, tokenizer, tmp_path):
    """Configurations by what their model starts from."""
    torch.manual_seed(0)
    start = tiny_model(tokenizer=tokenizer)
    start.save_pretrained(tmp_path / "start")
    tokenizer.save_pretrained(tmp_path / "start")
    SiglipVisionModel(SiglipVisionConfig(**SMALL, image_size=24, patch_size=8)).save_pretrained(tmp_path / "siglip")
    llama = LlamaConfig(**SMALL, num_key_value_heads=2, vocab_size=len(tokenizer) - 3, tie_word_embeddings=True, eos_token_id=0)
    AutoModelForCausalLM.from_config(llama).save_pretrained(tmp_path / "llama")
    tokenizer.save_pretrained(tmp_path / "llama")
    parts = {"vision": str(tmp_path / "siglip"), "language": str(tmp_path / "llama"), "image_size": 32}
    return {
        "preset": colour_run_in(tmp_path),
        "preset, lora": colour_run_in(tmp_path, stages=LORA),
        "folder": colour_run_in(tmp_path, model={"path": str(tmp_path / "start")}),
        "folder, lora": colour_run_in(tmp_path, model={"path": str(tmp_path / "start")}, stages=LORA),
        "parts, a larger vocabulary": colour_run_in(tmp_path, model=parts),
    }


def filled(config, world):
    """The model of a run as the trainer makes it."""
    empty = empty_model(config, load_run_tokenizer(config))
    set_trainable(empty.model, config.stages[0].modes)
    model = shard_model(empty.model, world, config.parallel)
    fill_model(model, empty.rows, world)
    return model


def world_of(config):
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank)}
    return start_world(config.parallel, "cpu")


def weights_on_ranks(configs, one_stream):
    build.ONE_STREAM = one_stream
    result = {}
    for name, config in configs.items():
        model = filled(config, world_of(config))
        result[name] = {key: parameter.full_tensor().detach().numpy() for key, parameter in model.named_parameters()}
    return result


@pytest.mark.parametrize(("ranks", "one_stream"), [(2, build.ONE_STREAM), (3, 0)])
def test_any_number_of_ranks_starts_from_the_same_weights(origins, monkeypatch, ranks, one_stream):
    monkeypatch.setattr(build, "ONE_STREAM", one_stream)
    expected = {name: dict(filled(config, alone("cpu")).named_parameters()) for name, config in origins.items()}
    for name, config in origins.items():
        for key, parameter in build_model(config, load_run_tokenizer(config)).named_parameters():
            assert torch.equal(parameter, expected[name][key]), (name, key)
    for answer in run_on_ranks(ranks, weights_on_ranks, origins, one_stream):
        for name, tensors in answer.items():
            assert tensors.keys() == expected[name].keys()
            for key, tensor in tensors.items():
                assert torch.equal(torch.from_numpy(tensor), expected[name][key]), (name, key)


def test_small_models_start_as_transformers_draws_them(origins):
    config = origins["preset"]
    tokenizer = load_run_tokenizer(config)
    torch.manual_seed(config.run.seed)
    expected = EagleForConditionalGeneration(model_config(config, tokenizer)).float()
    for name, parameter in build_model(config, tokenizer).named_parameters():
        assert torch.equal(parameter, expected.get_parameter(name)), name


def test_an_empty_model_holds_nothing(origins):
    for name, config in origins.items():
        model = empty_model(config, load_run_tokenizer(config)).model
        assert all(parameter.is_meta for parameter in model.parameters()), name


def fill_with_a_damaged_file(config):
    world = world_of(config)

    def damaged(start, stop):
        raise OSError("file ended too early")

    empty = empty_model(config, load_run_tokenizer(config))
    model = shard_model(empty.model, world, config.parallel)
    rows = dict(empty.rows)
    if world.rank == 1:
        name = "language_model.model.norm.weight"
        rows[name] = Rows(rows[name].shape, damaged)
    with pytest.raises(WeightsError) as caught:
        fill_model(model, rows, world)
    return str(caught.value)


def test_a_file_that_one_rank_cannot_read_ends_all_with_one_message(origins):
    first, second = run_on_ranks(2, fill_with_a_damaged_file, origins["folder"])
    assert first == second == "the weights that the run starts from can't be read: rank 1: OSError: file ended too early"
