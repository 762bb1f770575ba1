"""PEFT: an adapter acts as the merged model does, wherever it stands, and gradients reach every adapter."""

import pytest
import torch

from tests.support.packs import make_pack

peft = pytest.importorskip("peft")

LANGUAGE = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
VISION = ["fc1", "fc2", "out_proj", "patch_embedding"]
CONNECTOR = [r"mlp1\.1", r"mlp1\.3"]


def with_adapters(model, targets, **options):
    """The model with random adapters at `targets` (names of modules, or a regular expression)."""
    options = {"r": 4, "lora_alpha": 8, "init_lora_weights": False} | options
    torch.manual_seed(3)
    return peft.get_peft_model(model, peft.LoraConfig(target_modules=targets, **options)).eval()


def pattern(name):
    return rf".*{name}" if "\\" in name else [name]


@pytest.mark.parametrize("name", [*LANGUAGE, *VISION, *CONNECTOR, "embed_tokens", "lm_head"])
def test_an_adapter_acts_as_the_merged_model(make_model, make_batch, name):
    batch = make_batch()
    plain = make_model()(**batch)
    model = with_adapters(make_model(), pattern(name))
    adapted = model(**batch)
    assert (adapted.logits - plain.logits).abs().max() > 1e-3, "the adapter changes nothing"
    adapted.loss.backward()
    gradients = {key: p.grad for key, p in model.named_parameters() if p.requires_grad}
    assert gradients
    assert all(grad is not None and grad.abs().max() > 0 for grad in gradients.values())
    merged = model.merge_and_unload()(**batch)
    torch.testing.assert_close(adapted.logits, merged.logits, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(adapted.loss, merged.loss, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("language", ["Qwen2ForCausalLM", "Qwen3ForCausalLM", "LlamaForCausalLM"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_reach_every_adapter(make_model, make_batch, language, checkpointing):
    """`all-linear`, with and without recomputation, which changes no gradient."""
    gradients = []
    for recompute in {False, checkpointing}:
        model = with_adapters(make_model(language=language), "all-linear").train()
        if recompute:
            base = model.get_base_model()
            getattr(base, "activation_checkpointing_enable", base.gradient_checkpointing_enable)()
        model(**make_batch()).loss.backward()
        adapters = {name: p.grad for name, p in model.named_parameters() if "lora_" in name}
        assert len(adapters) == 2 * (2 * 7 + 2 * 6 + 2)  # 7 linears a decoder layer, 6 a vision layer, 2 in the connector
        assert [name for name, grad in adapters.items() if grad is None or not grad.abs().max() > 0] == []
        gradients.append(adapters)
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[-1][name], gradient, msg=name)


def test_packed_mode_takes_adapters(make_model, make_batch):
    batch = make_batch(rows=1)
    model = with_adapters(make_model(), [*LANGUAGE, "lm_head"])
    expected = model(**batch).loss
    targets = torch.full((14,), -100)
    targets[:-1] = batch["labels"][0, 1:]
    image = model.config.image_token_index
    packed = model.get_base_model()(make_pack(batch["input_ids"][0], tiles=batch["pixel_values"], image=image, targets=targets))
    torch.testing.assert_close(packed.loss, expected)


def test_adapters_are_saved_and_loaded(make_model, make_batch, tmp_path):
    batch = make_batch()
    model = with_adapters(make_model(), "all-linear")
    expected = model(**batch).logits
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(make_model(), tmp_path).eval()
    assert torch.equal(again(**batch).logits, expected)


def test_generation_with_adapters(make_model, make_batch):
    model = with_adapters(make_model(), "all-linear")
    inputs = {name: value for name, value in make_batch().items() if name != "labels"}
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    answer = model.generate(**inputs, **options)
    assert torch.equal(answer, model.merge_and_unload().generate(**inputs, **options))


def test_modules_to_save(make_model, make_batch):
    """A trained copy of the head next to adapters: gradients reach the copy."""
    model = with_adapters(make_model(), ["gate_proj"], modules_to_save=["lm_head", "mlp1"]).train()
    model(**make_batch()).loss.backward()
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert any("lm_head.modules_to_save" in name for name in trained)
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters() if p.requires_grad)


def test_prompt_tuning_gives_embeddings(make_model, make_batch):
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = peft.get_peft_model(make_model(), config)
    output = model(**make_batch())
    assert output.logits.shape[1] == 14 + 3
    output.loss.backward()
    assert all(p.grad.abs().max() > 0 for p in model.parameters() if p.requires_grad)
