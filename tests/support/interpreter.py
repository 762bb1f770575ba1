"""Code in a process of its own, where Triton interprets kernels on the CPU: a process that has imported Triton compiles them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def _version(module: object) -> tuple[int, ...]:
    return tuple(map(int, module.__version__.split(".")[:2]))  # type: ignore[attr-defined]


def interpret(code: str) -> None:
    """Run `code`, which may import from `tests`; fails with its output. Skips the test where Triton cannot interpret."""
    triton, numpy = pytest.importorskip("triton"), pytest.importorskip("numpy")
    if _version(triton) < (3, 7) and _version(numpy) >= (2, 4):
        pytest.skip("triton 3.6's interpreter can't loop with numpy >= 2.4")
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
