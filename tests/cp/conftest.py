"""Groups of ranks with a context mesh for each split."""

import pytest
import torch.distributed as dist

from eagle_cp import ContextMesh
from tests.support.ranks import Ranks


def context_meshes():
    """The ContextMesh with Ulysses size `u` for every divisor `u` of the number of ranks, by `u`."""
    size = dist.get_world_size()
    return {u: ContextMesh.from_group(ulysses=u) for u in range(1, size + 1) if size % u == 0}


@pytest.fixture(scope="module")
def ranks():
    """`ranks(size).call(function, ...)` runs `function(meshes, ...)` on a group that lives as long as the module."""
    groups = {}

    def get(size):
        if size not in groups:
            groups[size] = Ranks(size, context_meshes)
        return groups[size]

    yield get
    for group in groups.values():
        group.close()
