"""Kernels over rows of branches, next to torch."""

import pytest
import torch

from tests.support.interpreter import interpret


def check(device, dtype):
    from eagle_cp.kernels import rows

    torch.manual_seed(0)
    n, heads, dim = 75, 3, 24
    wide = torch.randn(n, 2 * heads, dim, device=device, dtype=dtype)
    for picked in (slice(20, 61), torch.randperm(n)[:41].to(device)):
        out, lse = wide.clone()[:, heads:], 3 * torch.randn(heads, n + 5, device=device)[:, :n]  # strided rows
        added, added_lse = torch.randn(41, heads, dim, device=device, dtype=dtype), 3 * torch.randn(heads, 41, device=device)
        own, own_lse = out[picked].double(), lse[:, picked].double()
        merged = torch.logaddexp(own_lse, added_lse.double())
        shares = ((x.double() - merged).exp().t().unsqueeze(-1) for x in (own_lse, added_lse))
        wanted, wanted_lse = out.double().clone(), lse.double().clone()
        wanted[picked] = sum(x.double() * share for x, share in zip((own, added), shares))
        wanted_lse[:, picked] = merged
        summed = out.float().clone()
        summed[picked] += added.float()
        again = out.clone()
        rows.add(again, added, picked)
        assert torch.equal(again, summed.to(dtype))
        rows.merge(out, lse, added, added_lse, picked)
        torch.testing.assert_close(lse, wanted_lse.float())
        torch.testing.assert_close(out, wanted.to(dtype))


def test_in_the_interpreter():
    interpret("import torch; from tests.cp.test_rows import check; check('cpu', torch.float32)")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_on_a_gpu(dtype):
    check("cuda", dtype)
