"""Warnings of libraries are shown once, and by the main rank only; what eagle logs is not filtered."""

import subprocess
import sys

import pytest

NOISY = """
import logging, warnings
from eagle_train.cli.progress import quiet
quiet()
for number in range(3):
    warnings.warn("a kernel is compiled", UserWarning)
    exec(f"warnings.warn('the same from line {number}')")
    logging.getLogger("library").warning("use the new name")
    logging.getLogger("eagle_train.data").info("part done")
warnings.warn("another")
import torch
logging.getLogger("torch.utils._pytree").warning("deprecated in torch")  # torch's loggers have a handler of their own
"""


@pytest.mark.parametrize("rank", [0, 1])
def test_every_text_once_on_the_main_rank(rank, monkeypatch):
    monkeypatch.setenv("RANK", str(rank))
    done = subprocess.run([sys.executable, "-W", "always", "-c", NOISY], capture_output=True, text=True, timeout=100, check=True)
    expected = {"a kernel is compiled": 1, "the same from line 2": 1, "use the new name": 1, "another": 1, "deprecated in torch": 1}
    for text, times in expected.items():
        shown = [line for line in done.stderr.splitlines() if line.endswith(text)]
        assert len(shown) == (times if rank == 0 else 0), done.stderr
    assert done.stderr.count("part done") == 3
