"""Runs the kernels of every other test file of this folder in Triton's interpreter: the same tests, on small shapes, without a GPU.

It needs a process of its own, because Triton decides at the import of a kernel's module whether it is interpreted.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")
numpy = pytest.importorskip("numpy")


def version(module) -> tuple[int, ...]:
    return tuple(int(part) for part in module.__version__.split(".")[:2])


@pytest.mark.skipif(version(triton) < (3, 7) and version(numpy) >= (2, 4), reason="triton 3.6's interpreter can't loop with numpy >= 2.4")
def test_kernels_in_the_interpreter():
    folder = Path(__file__).parent
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    chosen = "interpreter and not test_kernels_in_the_interpreter"
    command = [sys.executable, "-m", "pytest", str(folder), "-x", "-k", chosen, "-m", "not gpu"]
    run = subprocess.run(command, env=environment, cwd=folder.parents[1], capture_output=True, text=True, timeout=280, check=False)
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    passed = re.search(r"(\d+) passed", run.stdout)
    assert passed is not None
    assert int(passed[1]) >= 20, run.stdout[-2000:]
