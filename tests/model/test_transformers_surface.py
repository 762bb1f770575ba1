"""What transformers, its Trainer and TRL expect of a vision-language model: arguments, outputs, attributes and files."""

import json
import os
import stat
from inspect import getattr_static

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, Qwen2Config, Qwen2ForCausalLM

from eagle_model import EagleConfig, EagleForConditionalGeneration, preset
from eagle_model.checkpoint import save_checkpoint
from eagle_model.fused import is_plain, is_plain_linear
from eagle_model.generation import EagleGenerationMixin
from eagle_model.language.attention import Norm
from eagle_model.language.head import Head
from eagle_model.padded import CACHE_FIELD
from tests.support.packs import make_pack

IMAGE = 100


@pytest.fixture
def batch():
    """Two rows, the first padded on the left; one tile of four tokens each."""
    torch.manual_seed(1)
    ids = torch.randint(0, IMAGE, (2, 14))
    ids[:, 5:9] = IMAGE
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    labels = ids.masked_fill((mask == 0) | (ids == IMAGE), -100)
    labels[0, 3] = -100  # the first token of a row follows nothing
    tiles = torch.randint(0, 256, (2, 32, 32, 3), dtype=torch.uint8)
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": tiles, "labels": labels}


def without_labels(batch):
    return {name: value for name, value in batch.items() if name != "labels"}


def test_tuple_and_output_are_the_same(make_model, batch):
    model = make_model()
    output, values = model(**batch, use_cache=True), model(**batch, use_cache=True, return_dict=False)
    assert isinstance(values, tuple)
    assert torch.equal(values[0], output.loss)
    assert torch.equal(values[1], output.logits)
    assert list(output.keys()) == ["loss", "logits", CACHE_FIELD, "last_hidden_state"]
    model.config.return_dict = False
    assert isinstance(model(**batch), tuple)


def test_hidden_states(make_model, batch):
    """Embeddings first, one entry a layer, the last one normalised: what the head sees."""
    model = make_model()
    output = model(**batch, output_hidden_states=True)
    assert len(output.hidden_states) == model.config.text_config.num_hidden_layers + 1
    seen = batch["attention_mask"].bool()
    flat = model.embed(batch["input_ids"][seen], batch["pixel_values"])
    assert torch.equal(output.hidden_states[0][seen], flat)
    assert torch.equal(output.hidden_states[-1], output.last_hidden_state)
    torch.testing.assert_close(model.get_output_embeddings()(output.last_hidden_state), output.logits)
    assert model(**batch).hidden_states is None
    # The states are those of the model that stops after so many layers.
    del model.language_model.model.layers[1:]
    shorter = model.language_model.model.norm(output.hidden_states[1])
    torch.testing.assert_close(model(**batch).last_hidden_state[seen], shorter[seen])


def test_hidden_states_are_those_of_transformers(make_config):
    config = make_config()
    torch.manual_seed(0)
    theirs = Qwen2ForCausalLM(config.text_config).eval()
    ours = EagleForConditionalGeneration(config).eval()
    ours.language_model.load_state_dict(theirs.state_dict())
    ids = torch.randint(0, IMAGE, (2, 9))
    expected, got = theirs(ids, output_hidden_states=True), ours(ids, output_hidden_states=True)
    torch.testing.assert_close(got.logits, expected.logits, atol=1e-5, rtol=1e-5)
    for a, b in zip(got.hidden_states, expected.hidden_states, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("tiles", [True, False])
def test_embeddings_instead_of_ids(make_model, batch, tiles):
    model = make_model()
    options = without_labels(batch)
    if not tiles:
        options |= {"input_ids": batch["input_ids"].clamp(max=IMAGE - 1), "pixel_values": None}
    embeddings = model.get_input_embeddings()(options["input_ids"])
    expected = model(**options).logits
    del options["input_ids"]
    assert torch.equal(model(inputs_embeds=embeddings, **options).logits, expected)


def test_generate_from_embeddings(make_model):
    model = make_model()
    ids = torch.randint(0, IMAGE, (2, 9))
    embeddings = model.get_input_embeddings()(ids)
    options = {"max_new_tokens": 5, "do_sample": False}
    assert torch.equal(model.generate(inputs_embeds=embeddings, **options), model.generate(ids, **options)[:, 9:])


def test_image_features(make_model, batch):
    model = make_model()
    features = model.get_image_features(pixel_values=batch["pixel_values"])
    assert torch.equal(features.pooler_output, model.image_features(batch["pixel_values"]))
    assert features.last_hidden_state.shape == (2, 16, 32)
    assert torch.equal(model.get_image_features(batch["pixel_values"], return_dict=False)[1], features.pooler_output)


def test_logits_to_keep_takes_indices(make_model, batch):
    model = make_model()
    logits = model(**without_labels(batch)).logits
    kept = model(**without_labels(batch), logits_to_keep=torch.tensor([2, 7])).logits
    torch.testing.assert_close(kept, logits[:, [2, 7]])


@pytest.mark.parametrize("count", [37, torch.tensor(37), torch.tensor([37.0])])
def test_loss_is_divided_by_the_count_of_a_step(make_model, batch, count):
    """Microbatches of a step add up to the loss of the whole step."""
    model = make_model()
    labels = batch["labels"][:, 1:] != -100
    mean = model(**batch).loss
    assert model(**batch, num_items_in_batch=count).loss.item() == pytest.approx(mean.item() * labels.sum().item() / 37, rel=1e-6)
    parts = 0.0
    for row in range(2):
        part = {name: value[row : row + 1] for name, value in batch.items()}
        parts += model(**part, num_items_in_batch=labels.sum()).loss.item()
    assert parts == pytest.approx(mean.item(), rel=1e-5)


def test_backbone_gives_no_logits(make_model, batch):
    model = make_model()
    inputs = without_labels(batch)
    output = model.base_model(**inputs, use_cache=False)
    assert torch.equal(output.last_hidden_state, model(**inputs).last_hidden_state)
    assert output.logits is None
    with pytest.raises(TypeError, match="labels"):
        model.base_model(**batch)


@pytest.mark.parametrize("options", [{}, {"use_reentrant": True}, {"use_reentrant": False}])
def test_gradient_checkpointing_changes_nothing(make_model, batch, options):
    model = make_model().train()
    name = "activation_checkpointing" if hasattr(model, "activation_checkpointing_enable") else "gradient_checkpointing"
    enable, disable = (getattr(model, f"{name}_{what}") for what in ("enable", "disable"))
    results, calls = [], []
    handles = [layer.mlp.register_forward_pre_hook(lambda *_: calls.append(1)) for layer in model.language_model.model.layers]
    for step in (lambda: None, lambda: enable(**{f"{name}_kwargs": options or None}), disable):
        step()
        calls.clear()
        model.zero_grad()
        model(**batch).loss.backward()
        results.append(([p.grad.clone() for p in model.parameters()], len(calls), getattr(model, f"is_{name}")))
    for handle in handles:
        handle.remove()
    layers = model.config.text_config.num_hidden_layers
    assert [(calls, on) for _, calls, on in results] == [(layers, False), (2 * layers, True), (layers, False)]
    for gradients, _, _ in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0][0], gradients))
    enable()
    with pytest.raises(ValueError, match="use_cache=False"):
        model(**batch, use_cache=True)
    with torch.no_grad():
        assert getattr(model(**batch, use_cache=True), CACHE_FIELD) is not None


def test_recomputation_repeats_dropout(make_model, batch):
    """Gradients of a loss with dropout are those of the forward that ran, not of other random numbers."""
    model = make_model().train()
    for layer in model.language_model.model.layers:
        layer.mlp.down_proj = nn.Sequential(layer.mlp.down_proj, nn.Dropout(0.5))
    gradients = []
    for mode in ("keep", "recompute"):
        model.set_activation_checkpointing(mode)
        model.zero_grad()
        torch.manual_seed(5)
        model(**batch).loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients))
    with pytest.raises(ValueError, match="dropout"):
        model.set_activation_checkpointing("offload")


def test_plain_modules():
    linear = nn.Linear(4, 4)
    assert is_plain_linear(linear)
    assert is_plain_linear(nn.Linear(4, 4, bias=False, dtype=torch.bfloat16))
    assert is_plain(Norm(4, 1e-6), Norm)

    class Adapter(nn.Linear):
        pass

    assert not is_plain_linear(Adapter(4, 4))
    assert not is_plain_linear(nn.Linear(4, 4, device="meta"))
    for change in (
        lambda module: module.register_forward_hook(lambda *_: None),
        lambda module: module.register_forward_pre_hook(lambda *_: None),
        lambda module: module.register_full_backward_hook(lambda *_: None),
        lambda module: setattr(module, "forward", module.forward),
        lambda module: setattr(module, "weight", nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)),
        lambda module: nn.utils.parametrize.register_parametrization(module, "weight", nn.Identity()),
        lambda module: nn.utils.spectral_norm(module),
    ):
        module = nn.Linear(4, 4)
        change(module)
        assert not is_plain_linear(module)


class Doubled(nn.Module):
    """Stands for anything that wraps a module: its output counts twice."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, *args):
        return 2 * self.inner(*args)


WRAPPED = [
    *(f"language_model.model.layers.0.{name}" for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj")),
    *(f"language_model.model.layers.0.{name}" for name in ("mlp.down_proj", "input_layernorm", "post_attention_layernorm")),
    *(f"language_model.{name}" for name in ("model.embed_tokens", "model.norm", "lm_head")),
    *(f"vision_model.vision_model.embeddings.{name}_embedding" for name in ("patch", "position")),
    *(f"vision_model.vision_model.{name}" for name in ("encoder.layers.0.mlp.fc1", "post_layernorm")),
    *(f"mlp1.{index}" for index in (0, 1, 3)),
]


@pytest.mark.parametrize("name", WRAPPED)
def test_a_replaced_module_is_called(make_model, batch, name):
    """A module that wraps another one acts exactly as the other one with twice its weights, in the loss and in the gradients."""
    model, merged = make_model(text_config={"tie_word_embeddings": False}), make_model(text_config={"tie_word_embeddings": False})
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, Doubled(model.get_submodule(name)))
    with torch.no_grad():
        for parameter in merged.get_submodule(name).parameters():
            parameter.mul_(2)
    losses = []
    for each in (model, merged):
        losses.append(each(**batch).loss)
        losses[-1].backward()
        row, weights = {name: value[1] for name, value in batch.items()}, torch.linspace(0, 1, 14)
        pack = make_pack(row["input_ids"], tiles=batch["pixel_values"][1:], targets=row["labels"], token_weights=weights, denominator=3.0)
        losses.append(each(pack).loss)
    torch.testing.assert_close(losses[0], losses[2], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(losses[1], losses[3], atol=1e-5, rtol=1e-5)
    inner = model.get_submodule(f"{name}.inner")
    for ours, theirs in zip(inner.parameters(), merged.get_submodule(name).parameters(), strict=True):
        # d/dw of f(2w) is 2 f'(2w).
        torch.testing.assert_close(ours.grad, 2 * theirs.grad, atol=1e-5, rtol=1e-4)


def test_hooks_of_every_module_run(make_model, batch):
    """A forward hook on a module turns off the fused path that would have skipped it."""
    model = make_model()
    expected = model(**batch).loss
    ran = set()
    # Containers have no forward, and the tower's embeddings stand for the names of their weights only.
    skipped = {"language_model", "vision_model.vision_model.embeddings", "vision_model.vision_model.encoder"}
    wanted = {name for name, module in model.named_modules() if not isinstance(module, nn.ModuleList)} - skipped
    for name, module in model.named_modules():
        module.register_forward_hook(lambda *_, name=name: ran.add(name))
    torch.testing.assert_close(model(**batch).loss, expected)
    assert ran == wanted


def test_the_head_of_a_resized_vocabulary_is_the_own_one(make_model):
    model = make_model(text_config={"tie_word_embeddings": False})
    model.resize_token_embeddings(131)
    assert type(model.get_output_embeddings()) is Head


@pytest.mark.parametrize("name", ["flash_attention_2", "flex_attention", "eager", "sdpa"])
def test_attention_kernels_by_name(make_model, tmp_path, batch, name, caplog):
    """Eagle chooses the kernel of packed attention itself: any name is accepted, with a warning when it is not used."""
    model = make_model()
    model.save_pretrained(tmp_path)
    loaded = EagleForConditionalGeneration.from_pretrained(tmp_path, attn_implementation=name).eval()
    torch.testing.assert_close(loaded(**batch).logits, model(**batch).logits, atol=1e-5, rtol=1e-5)
    assert ("has no effect" in caplog.text) == (name not in ("eager", "sdpa"))


@pytest.mark.parametrize("inside", [None, "vision_config", "text_config"])
def test_attention_kernel_that_a_released_file_names(make_model, tmp_path, batch, inside, caplog):
    """The original's training leaves `_attn_implementation` in config.json; the folder loads, here and with the Auto class."""
    model = make_model()
    model.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    values = json.loads(file.read_text())
    (values if inside is None else values[inside])["_attn_implementation"] = "flash_attention_2"
    file.write_text(json.dumps(values))
    for cls in (EagleForConditionalGeneration, AutoModelForImageTextToText):
        loaded = cls.from_pretrained(tmp_path).eval()
        assert torch.equal(loaded(**batch).logits, model(**batch).logits)
    assert "has no effect" not in caplog.text


def test_a_folder_of_another_model_is_refused(tmp_path, monkeypatch):
    Qwen2Config(vocab_size=64).save_pretrained(tmp_path)
    monkeypatch.setattr(EagleForConditionalGeneration, "__init__", lambda *_, **__: pytest.fail("the model was built"))
    for load in (EagleConfig.from_pretrained, EagleForConditionalGeneration.from_pretrained):
        with pytest.raises(ValueError, match=r"holds a model of type 'qwen2', expected 'eagle_2_5_vl'"):
            load(tmp_path)


def test_auto_classes_and_attributes(make_model, tmp_path):
    model = make_model()
    assert model.config.auto_map == {}
    assert "auto_map" not in json.loads(model.config.to_json_string())
    assert model.accepts_loss_kwargs
    assert model.supports_gradient_checkpointing
    model.save_pretrained(tmp_path)
    assert isinstance(AutoModelForCausalLM.from_pretrained(tmp_path), EagleForConditionalGeneration)


@pytest.mark.parametrize("way", ["save_pretrained", "save_checkpoint"])
def test_files_of_a_saved_model(make_model, make_config, small_tokenizer, tmp_path, way):
    """generation_config.json ends at <|im_end|>, a card shows how to load it, and all files have the mode that the umask gives."""
    model = make_model(make_config(tokenizer=small_tokenizer))
    folder = tmp_path / "model"

    def save():
        if way == "save_pretrained":
            model.save_pretrained(folder)
        else:
            save_checkpoint(model.state_dict(), model.config, folder)

    old = os.umask(0o027)
    try:
        save()
    finally:
        os.umask(old)
    assert {path.name for path in folder.iterdir()} == {"config.json", "generation_config.json", "model.safetensors", "README.md"}
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o640}
    end = small_tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == end
    card = (folder / "README.md").read_text()
    assert "eagle_model.register()" in card
    assert str(tmp_path) not in card
    (folder / "README.md").write_text("mine")
    save()
    assert (folder / "README.md").read_text() == "mine"


def test_save_checkpoint_takes_the_end_token(make_model, tmp_path):
    model = make_model()
    save_checkpoint(model.state_dict(), model.config, tmp_path, end_token_id=7)
    assert EagleForConditionalGeneration.from_pretrained(tmp_path).generation_config.eos_token_id == 7


def test_answers_end_at_im_end_with_a_base_tokenizer(small_tokenizer, tmp_path):
    """The tokenizers of base models have another end token; answers are trained to end with <|im_end|>."""
    from transformers import PreTrainedTokenizerFast

    base = PreTrainedTokenizerFast(tokenizer_object=small_tokenizer.backend_tokenizer, eos_token="<|endoftext|>", pad_token="<|endoftext|>")
    config = preset("tiny", tokenizer=base)
    end = base.convert_tokens_to_ids("<|im_end|>")
    assert config.text_config.eos_token_id == end != base.eos_token_id
    EagleForConditionalGeneration(config).save_pretrained(tmp_path)
    assert EagleForConditionalGeneration.from_pretrained(tmp_path).generation_config.eos_token_id == end


def test_no_method_for_generation_is_hidden_by_another_base():
    for name, value in vars(EagleGenerationMixin).items():
        if callable(value):
            assert getattr_static(EagleForConditionalGeneration, name) is value, name


@torch.no_grad()
def test_image_tokens_without_pixels_are_refused(make_model, batch):
    """Before there is a cache: an answer may contain what the model chose."""
    model = make_model()
    inputs = {name: value for name, value in batch.items() if name in ("input_ids", "attention_mask")}
    count = int((inputs["input_ids"] == model.config.image_token_index).sum())
    assert count
    with pytest.raises(ValueError, match=f"{count} visual tokens in input_ids, but 0 tiles"):
        model(**inputs)
    with pytest.raises(ValueError, match="but 0 tiles"):
        model.generate(**inputs, max_new_tokens=1)
    cache = model(**batch, use_cache=True).past_key_values
    image = torch.full((inputs["input_ids"].shape[0], 1), model.config.image_token_index)
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(image)], 1)
    assert model(input_ids=image, attention_mask=mask, past_key_values=cache).logits.shape[1] == 1
