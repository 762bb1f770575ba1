"""Hypothesis without limits on time, and on a CI machine with the same examples every time. On a GPU, cuBLAS in one order.

A fixture for tests of several folders: a cluster of two nodes.
"""

import os
import sys

import pytest
from hypothesis import HealthCheck, settings

# A loaded machine may suspend a test for seconds.
settings.register_profile("eagle", deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=bool(os.environ.get("CI")))
settings.load_profile("eagle")

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read before the first matmul of the process, whichever test makes it


@pytest.fixture(autouse=True)
def closed_process_group():
    """A process group that a test leaves open is closed: ranks that later tests fork would inherit it."""
    yield
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


@pytest.fixture
def cluster(monkeypatch):
    """(cluster, second node): Ray with two nodes of one CPU each on this machine, connected; tests' modules can be imported there."""
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("PYTHONPATH", ":".join(sys.path))
    found = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    second = found.add_node(num_cpus=1)
    ray.init(address=found.address, log_to_driver=False)
    found.wait_for_nodes()
    try:
        yield found, second
    finally:
        ray.shutdown()
        found.shutdown()
