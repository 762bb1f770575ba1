"""GPUs are found by the names that drivers and people give them."""

import pytest
import torch

from eagle_train.planning.gpus import GPUS, find_gpu
from eagle_train.training.speed import memory, peak_flops


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA H100 NVL", "H100 NVL"),
        ("NVIDIA H200", "H200"),
        ("h200", "H200"),
        ("NVIDIA GH200 480GB", "GH200"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA A100-SXM4-40GB", "A100 40GB"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA L4", "L4"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("NVIDIA RTX 6000 Ada Generation", "RTX 6000 Ada"),
        ("Tesla T4", None),
    ],
)
def test_names(name, found):
    gpu = find_gpu(name)
    assert (gpu.name if gpu else None) == found


def test_every_row_finds_itself():
    assert all(find_gpu(gpu.name) == gpu for gpu in GPUS)


def test_a_cpu_has_memory_and_no_peak_rate():
    cpu = torch.device("cpu")
    assert peak_flops(cpu, "bfloat16") is None
    before, _ = memory(cpu)
    held = torch.ones(64 << 20, dtype=torch.uint8)
    now, peak = memory(cpu)
    assert now - before > 32 << 20
    assert peak >= now - (1 << 20)
    del held
    assert memory(cpu)[1] >= peak
