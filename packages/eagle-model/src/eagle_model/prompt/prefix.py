"""Samples that share a prompt's beginning (the same video, other questions) as a prefix and branches, which a pack holds once.

A label is predicted by the token before it. The last token of the prefix has one next token for each branch, so no label may stand first in
a branch: the prefix ends at least one token before the first label of any sample. Loss and gradients then are those of the separate
samples, and each target belongs to one branch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from eagle_model.prompt.encode import Encoded
from eagle_model.prompt.render import IGNORE_INDEX


class SharedPrefix(NamedTuple):
    """prefix: ids that all samples begin with, without labels. branches: what follows in each sample, in their order."""

    prefix: Encoded
    branches: tuple[Encoded, ...]

    @property
    def documents(self) -> list[Encoded]:
        """Prefix and branches, in the order in which a pack holds them."""
        return [self.prefix, *self.branches]

    @property
    def tokens(self) -> int:
        """Tokens in the pack: the prefix once, and the branches."""
        return sum(len(part.input_ids) for part in self.documents)


def share_prefix(samples: Sequence[Encoded], *, at_least: int = 1) -> SharedPrefix:
    """The longest prefix that `samples` can share, and their branches.

    The prefix ends before the first token in which samples differ, at least one token before the first label, and leaves every sample at
    least one token. at_least: tokens that the prefix must have (for example through the last visual token).

    Raises ValueError for no sample, and, with the reason, when the prefix would have fewer than `at_least` tokens.
    """
    if not samples:
        raise ValueError("share_prefix: no samples")
    shortest = min(len(sample.input_ids) for sample in samples)
    first = samples[0].input_ids[:shortest]
    length, reason = shortest - 1, "the shortest sample ends there"
    for number, sample in enumerate(samples):
        different = np.flatnonzero(sample.input_ids[:shortest] != first)
        if len(different) and different[0] < length:
            length, reason = int(different[0]), f"sample {number} differs from sample 0 there"
        labelled = np.flatnonzero(sample.labels != IGNORE_INDEX)
        if len(labelled) and labelled[0] - 1 < length:
            length, reason = (
                int(labelled[0]) - 1,
                f"sample {number} has a label at token {labelled[0]}, which a token of its branch predicts",
            )
    if length < max(at_least, 1):
        raise ValueError(
            f"share_prefix: samples share {max(length, 0)} tokens, at least {max(at_least, 1)} are needed: {reason}; "
            "pack them as separate samples"
        )
    prefix = Encoded(samples[0].input_ids[:length], samples[0].labels[:length])
    return SharedPrefix(prefix, tuple(Encoded(sample.input_ids[length:], sample.labels[length:]) for sample in samples))
