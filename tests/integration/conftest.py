"""A small model and batches for tests with other libraries; each module skips itself when its library is not installed."""

import pytest
import torch

from eagle_model import EagleProcessor
from tests.support.models import small_tokenizer, tiny_model

VISION = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_hidden_layers": 2}
TEXT = {"hidden_size": 64, "intermediate_size": 128}


def pytest_collection_modifyitems(items):
    for item in items:
        if "/integration/" in item.path.as_posix():
            item.add_marker(pytest.mark.integration)


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tokenizer():
    return small_tokenizer(320)


@pytest.fixture(scope="session")
def make_model(tokenizer):
    def make(*, seed=0, tied=False, language="Qwen2ForCausalLM"):
        text = TEXT | {"tie_word_embeddings": tied, "architectures": [language]}
        return tiny_model(seed=seed, tokenizer=tokenizer, vision_config=VISION, text_config=text)

    return make


@pytest.fixture(scope="session")
def folder(make_model, tokenizer, tmp_path_factory):
    """A saved model with its processor."""
    path = tmp_path_factory.mktemp("model")
    model = make_model()
    model.save_pretrained(path)
    EagleProcessor.for_config(tokenizer, model.config).save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def make_batch(make_model):
    image = make_model().config.image_token_index

    def make(rows=2, seed=1):
        """Rows of 14 tokens with one tile of 4 tokens each; the answer is labelled."""
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(0, 250, (rows, 14), generator=generator)
        ids[:, 2:6] = image
        labels = ids.clone()
        labels[:, :8] = -100
        tiles = torch.randint(0, 256, (rows, 32, 32, 3), dtype=torch.uint8, generator=generator)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": tiles, "labels": labels}

    return make
