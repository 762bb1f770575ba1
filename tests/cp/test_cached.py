"""Attention over a key/value cache without a mask in memory, against a reference with one."""

import pytest
import torch
import torch.nn.functional as F

from eagle_cp import cached_attention


def reference(q, k, v, scale=None):
    length, keys = q.shape[1], k.shape[1]
    mask = torch.ones(length, keys, dtype=torch.bool).tril(keys - length)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=True).transpose(1, 2)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(("length", "keys"), [(1, 1), (1, 37), (5, 5), (5, 37), (70, 300)])
@pytest.mark.parametrize("heads", [(4, 4), (6, 2)])
def test_new_tokens_see_the_keys_up_to_themselves(batch, length, keys, heads):
    torch.manual_seed(0)
    q = torch.randn(batch, length, heads[0], 16)
    # As a cache holds them: heads before tokens, room for more.
    k, v = (torch.randn(batch, heads[1], keys + 9, 16)[:, :, :keys].transpose(1, 2) for _ in "kv")
    torch.testing.assert_close(cached_attention(q, k, v), reference(q, k, v), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(cached_attention(q, k, v, scale=0.5), reference(q, k, v, 0.5), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("q", "k"), [((1, 5, 4, 8), (1, 4, 2, 8)), ((2, 1, 4, 8), (1, 9, 2, 8)), ((1, 2, 4, 8), (1, 9, 3, 8)), ((1, 2, 4, 8), (1, 9, 2, 16))]
)
def test_shapes_that_do_not_fit_are_refused(q, k):
    with pytest.raises(ValueError, match=r"cached_attention: q \("):
        cached_attention(torch.zeros(q), torch.zeros(k), torch.zeros(k))


def test_a_kernel_that_cannot_run_is_named():
    x = torch.zeros(1, 4, 2, 8)
    with pytest.raises(ValueError, match="backend 'cudnn' can't run"):
        cached_attention(x, x, x, backend="cudnn")


@pytest.mark.gpu
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize(("length", "keys"), [(1, 1000), (512, 4096)])
def test_on_a_gpu(batch, length, keys):
    torch.manual_seed(0)
    q = torch.randn(batch, length, 28, 128, device="cuda", dtype=torch.bfloat16)
    k, v = (torch.randn(batch, 4, keys + 64, 128, device="cuda", dtype=torch.bfloat16)[:, :, :keys].transpose(1, 2) for _ in "kv")
    expected = reference(*(x.float().cpu() for x in (q, k, v)))
    torch.testing.assert_close(cached_attention(q, k, v).float().cpu(), expected, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("length", [1, 3])
def test_a_scale_that_kernels_do_not_take_is_refused(length):
    q, k = torch.randn(1, length, 4, 8), torch.randn(1, 5, 2, 8)
    for scale in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match=r"cached_attention: scale is .*; expected a finite number above 0"):
            cached_attention(q, k, k, scale=scale)


def test_packed_tensors_are_refused_by_shape():
    with pytest.raises(ValueError, match=r"cached_attention: q \(3, 4, 8\), k \(5, 2, 8\).*expected \[B, L, Hq, D\]"):
        cached_attention(torch.randn(3, 4, 8), torch.randn(5, 2, 8), torch.randn(5, 2, 8))
