"""Codes of 8-bit states: thresholds next to the rule that they stand for, and the kernel's arithmetic next to a search."""

import pytest
import torch

from eagle_train.training import codes
from tests.support.interpreter import interpret


@pytest.mark.parametrize("signed", [True, False])
def test_a_threshold_is_the_smallest_number_of_its_code(signed):
    table = codes.dynamic_table(signed).float()
    assert codes.is_dynamic(table, signed)
    assert not codes.is_dynamic(table, not signed)
    assert not codes.is_dynamic(table * 1.001, signed)
    found = codes.thresholds(table)
    assert found[0] == -torch.inf
    assert (found[1:] > table[:-1]).all()
    assert (found[1:] <= table[1:]).all()
    before = torch.nextafter(found[1:], torch.tensor(-torch.inf))
    assert torch.equal(codes.nearest(table, found[1:]), torch.arange(1, 256))
    assert torch.equal(codes.nearest(table, before), torch.arange(255))


def test_torchao_has_these_tables():
    subclass = pytest.importorskip("torchao.optim.subclass_8bit")
    for signed, make in ((True, subclass.get_qmap_signed), (False, subclass.get_qmap_unsigned)):
        assert codes.is_dynamic(torch.tensor(make()), signed)


def values(table):
    """All entries and thresholds with their neighbours, powers of ten, and numbers between them."""
    at = torch.cat([table, codes.thresholds(table)[1:], 10.0 ** -torch.arange(0.0, 9.0)])
    around = torch.cat([at, *(torch.nextafter(at, torch.tensor(end)) for end in (-2.0, 2.0))])
    generator = torch.Generator().manual_seed(0)
    spread = torch.rand(20000, generator=generator) * torch.logspace(-9, 0, 20000)
    every = torch.cat([around, spread, torch.tensor([0.0, 1.0])])
    return (torch.cat([every, -every]) if table[0] < 0 else every.clamp(min=0)).clamp(-1, 1)


def check_nearest(device):
    from tests.support.nearest_kernel import nearest

    for signed, zero, first in ((True, 127, 1), (False, 0, 2)):
        table = codes.dynamic_table(signed).float()
        given = values(table)
        found = nearest(codes.thresholds(table).to(device), given.to(device), zero=zero, first=first).cpu()
        expected = codes.nearest(table, given)
        wrong = found != expected
        assert not wrong.any(), (signed, given[wrong][:5], found[wrong][:5], expected[wrong][:5])
        assert len(expected.unique()) == 256


def test_the_kernel_counts_as_a_search_does():
    interpret("from tests.train.test_codes import check_nearest; check_nearest('cpu')")


@pytest.mark.gpu
def test_the_kernel_counts_as_a_search_does_on_a_gpu():
    check_nearest("cuda")
