"""The transformers integration refuses what it can't compute exactly, and does not change other models."""

import warnings

import pytest
import torch

from eagle_cp import Layout, register_attention
from eagle_cp.hugging_face import hugging_face_attention


class Module(torch.nn.Module):
    is_causal = True


def call(**changes):
    arguments = {"query": torch.randn(1, 4, 6, 8), "key": torch.randn(1, 2, 6, 8), "value": torch.randn(1, 2, 6, 8)}
    arguments |= {"eagle_layout": Layout.single([0, 2, 6]), **changes}
    return hugging_face_attention(Module(), **arguments)


def test_shapes_follow_transformers():
    out, weights = call()
    assert out.shape == (1, 6, 4, 8)
    assert weights is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eagle_layout": None}, "no layout"),
        ({"attention_mask": torch.zeros(1, 1, 6, 6)}, "masks are not supported"),
        ({"dropout": 0.1}, "dropout 0.1 is not supported"),
        ({"sliding_window": 3}, "sliding window of 3"),
        ({"softcap": 30.0}, "soft-capped"),
        ({"query": torch.randn(2, 4, 6, 8)}, "pack the batch"),
        ({"key": torch.randn(1, 2, 9, 8), "value": torch.randn(1, 2, 9, 8)}, "use_cache=False"),
    ],
)
def test_refusals(changes, message):
    with pytest.raises(ValueError, match=message):
        call(**changes)


def test_a_window_longer_than_every_document_is_no_window():
    torch.testing.assert_close(call(query=torch.ones(1, 4, 6, 8), sliding_window=4)[0].shape, call()[0].shape)


def test_positions_of_other_tokens_are_warned_of_once():
    """What a model makes without position_ids is wrong for the second branch of a tree."""
    tree = Layout.single([0, 2, 4, 6], prefixes=[-1, 0, 0])
    module = Module()
    arguments = {"query": torch.randn(1, 4, 6, 8), "key": torch.randn(1, 2, 6, 8), "value": torch.randn(1, 2, 6, 8), "eagle_layout": tree}
    with pytest.warns(UserWarning, match=r"token 4 of the pack has position 4, in its document 2\); call the model with position_ids="):
        hugging_face_attention(module, **arguments, position_ids=torch.arange(6)[None])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hugging_face_attention(module, **arguments, position_ids=torch.arange(6)[None])
        call(eagle_layout=tree, position_ids=tree.position_ids()[None])
        call(position_ids=torch.arange(6)[None])


@pytest.mark.parametrize("padded", [0, 2])
def test_a_mask_of_the_model_is_not_dropped(padded):
    """A mask made as models make it: one of ones is accepted; with padding, padded rows would be attended to."""
    from transformers import Qwen2Config
    from transformers.masking_utils import create_causal_mask

    register_attention()
    config = Qwen2Config(hidden_size=8, num_attention_heads=2, num_key_value_heads=1, attn_implementation="eagle_cp")
    mask = torch.ones(1, 6, dtype=torch.int64)
    mask[:, :padded] = 0

    def make():
        return create_causal_mask(config, torch.zeros(1, 6, 8), attention_mask=mask, past_key_values=None)

    if padded:
        with pytest.raises(ValueError, match="2 of 6 tokens"):
            make()
    else:
        assert make() is None


def test_registering_adds_a_name_and_changes_no_model():
    from transformers import AttentionInterface
    from transformers.models.qwen2 import modeling_qwen2

    before = modeling_qwen2.eager_attention_forward
    register_attention("eagle_cp_test")
    assert AttentionInterface()["eagle_cp_test"] is hugging_face_attention
    assert modeling_qwen2.eager_attention_forward is before
