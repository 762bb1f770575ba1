"""A new model from the folders of its two parts."""

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, SiglipConfig, SiglipModel, SiglipVisionConfig, SiglipVisionModel

from eagle_model import EagleProcessor, assemble
from eagle_model.parts import resize_positions
from tests.support.packs import make_pack

VISION = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 3, "image_size": 24, "patch_size": 8}
TEXT = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("parts")
    text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 50}
    SiglipModel(SiglipConfig(vision_config=VISION, text_config=text | {"projection_size": 24})).save_pretrained(root / "siglip")
    SiglipVisionModel(SiglipVisionConfig(**(VISION | {"image_size": 32}))).save_pretrained(root / "vision")
    for name, config in (
        ("qwen", Qwen2Config(**TEXT, vocab_size=64, tie_word_embeddings=True)),
        ("llama", LlamaConfig(**TEXT, vocab_size=400)),
    ):
        model = AutoModelForCausalLM.from_config(config)
        model.save_pretrained(root / name, max_shard_size="20KB")
    return root


@pytest.mark.parametrize("language", ["qwen", "llama"])
@pytest.mark.parametrize("vision", ["siglip", "vision"])
def test_assemble(folders, small_tokenizer, vision, language):
    model = assemble(folders / vision, folders / language, small_tokenizer, image_size=32).eval()
    theirs = AutoModelForCausalLM.from_pretrained(folders / language)
    tower = SiglipVisionModel.from_pretrained(folders / vision)
    ids = torch.arange(50)
    ours = model(make_pack(ids, image=-1)).logits
    torch.testing.assert_close(ours[:, :64], theirs(ids[None]).logits[0, :, :64], atol=1e-5, rtol=1e-5)
    assert ours.shape[1] == max(theirs.config.vocab_size, len(small_tokenizer))
    pixels = torch.rand(1, 3, 32, 32)
    if vision == "vision":
        torch.testing.assert_close(model.vision_model(pixels), tower(pixels).last_hidden_state, atol=1e-5, rtol=1e-5)
    processor = EagleProcessor.for_config(small_tokenizer, model.config)
    inputs = processor(text="Hi", images=[torch.zeros(3, 40, 40, dtype=torch.uint8)])
    assert model.generate(**inputs, max_new_tokens=2).shape[1] > inputs["input_ids"].shape[1]
    assert (model.config.select_layer, model.config.use_thumbnail, model.config.tile_size) == (-1, True, 32)


def test_positions():
    d = torch.arange(9.0).view(9, 1).expand(9, 4)
    assert torch.equal(resize_positions(d, 9), d)
    larger = resize_positions(d, 36)
    assert larger.shape == (36, 4)
    assert larger.mean().item() == pytest.approx(d.mean().item(), abs=1e-4)
    with pytest.raises(ValueError, match="squares"):
        resize_positions(d, 10)


def test_missing_parts_are_named(folders, small_tokenizer):
    with pytest.raises(ValueError, match="in neither"):
        assemble(folders / "qwen", folders / "qwen", small_tokenizer, vision_config=VISION | {"image_size": 32})
