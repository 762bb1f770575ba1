"""The run's model: what is written about it is known, or refused with the nearest right name."""

import pytest
import torch

from eagle_train.config import ConfigError, parse_config
from eagle_train.training.model import attention_backend, model_config


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"text_config": {"num_hidden_layer": 1}}, "no field text_config.num_hidden_layer; did you mean num_hidden_layers?"),
        ({"vision_config": {"patchsize": 8}}, "did you mean patch_size?"),
        ({"text_conf": {"num_hidden_layers": 1}}, "model.overrides: the configuration has no field text_conf; did you mean text_config?"),
        ({"text_config": {"rope_theta": 5.0}}, "write rope_parameters"),
        ({"text_config": {"num_hidden_layers": "four"}}, "model.overrides: Validation error for field 'num_hidden_layers'"),
        ({"text_config": {"architectures": ["Other"]}}, "model.overrides: text_config: the language model 'Other' is not supported"),
        ({"text_config": 5}, "model.overrides.text_config: is 5"),
        ({"max_dynamic_tiles": 3}, "model.overrides.max_dynamic_tiles: tiling.max_tiles decides this"),
    ],
)
def test_overrides_are_fields_of_the_model(make_config, tokenizer, overrides, message, tmp_path):
    with pytest.raises(ConfigError) as caught:
        model_config(make_config({}, model={"overrides": overrides}), tokenizer)
    assert message in str(caught.value)
    # A checkpoint's configuration is held to the same.
    model_config(make_config({}), tokenizer).save_pretrained(tmp_path / "there")
    with pytest.raises(ConfigError) as caught:
        model_config(make_config({}, model={"path": "there", "overrides": overrides}), tokenizer)
    assert message in str(caught.value)


def test_fields_that_files_leave_out_can_be_set(make_config, tokenizer):
    overrides = {"patch_initializer_range": 0.25, "text_config": {"architectures": ["Qwen3ForCausalLM"], "head_dim": 16}}
    made = model_config(make_config({}, model={"overrides": overrides}), tokenizer)
    assert (made.patch_initializer_range, made.text_config.head_dim, made.text_config.model_type) == (0.25, 16, "qwen3")


def test_attention_by_name_is_known_and_can_run(make_config, tokenizer):
    with pytest.raises(ConfigError, match=r"model.attention: there is no backend 'torchflash'; did you mean 'torch-flash'\?"):
        model_config(make_config({}, model={"attention": "torchflash"}), tokenizer)
    config = make_config({}, model={"attention": "torch-flash"})
    described = model_config(config, tokenizer)
    with pytest.raises(ConfigError, match=r"model.attention: backend 'torch-flash' can't run: needs CUDA tensors, got cpu"):
        attention_backend(config, described, torch.device("cpu"))
    assert attention_backend(make_config({}, model={"attention": "cpu"}), described, torch.device("cpu")) == "cpu"
    assert attention_backend(make_config({}), described, torch.device("cpu")) is None


def test_weights_of_another_model_are_refused_by_their_type(tmp_path, tokenizer):
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    with pytest.raises(ConfigError, match=r"config.json: model_type is 'qwen2', and only 'eagle_2_5_vl' can be loaded"):
        model_config(parse_config({"model": {"path": str(tmp_path)}}), tokenizer)
