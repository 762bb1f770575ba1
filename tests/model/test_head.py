"""The loss of every token comes with the loss, whatever the head is, and without gradient."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from eagle_model.language.head import Head, head_loss


class Wrapped(nn.Module):
    """A head that something else has replaced."""

    def __init__(self, head):
        super().__init__()
        self.inner = head

    def forward(self, hidden):
        return F.linear(hidden, self.inner.weight)


@pytest.mark.parametrize("wrap", [lambda head: head, Wrapped], ids=["plain", "replaced"])
def test_token_losses(wrap):
    torch.manual_seed(0)
    head, hidden = wrap(Head(16, 50, bias=False)), torch.randn(20, 16, requires_grad=True)
    targets, weights = torch.randint(0, 50, (20,)), torch.rand(20)
    targets[::3] = -100
    loss, losses = head_loss(head, hidden, targets, token_weights=weights, denominator=torch.tensor(7.0), token_losses=True)
    weight = (head.inner if isinstance(head, Wrapped) else head).weight
    expected = F.cross_entropy(F.linear(hidden, weight), targets, reduction="none", ignore_index=-100)
    torch.testing.assert_close(losses, expected.detach(), atol=1e-5, rtol=1e-5)
    assert not losses.requires_grad
    assert loss.item() == pytest.approx(((losses * weights).sum() / 7).item(), rel=1e-5)
    assert torch.equal(loss, head_loss(head, hidden, targets, token_weights=weights, denominator=torch.tensor(7.0)))
