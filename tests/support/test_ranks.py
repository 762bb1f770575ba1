"""The ranks of tests: results in order, the error of the rank that failed, and time limits."""

import os
import sys
import time

import pytest
import torch
import torch.distributed as dist

from tests.support.ranks import Ranks, outputs_of, run_on_ranks, start_processes


def total(state, number):
    x = torch.tensor([number + dist.get_rank()])
    dist.all_reduce(x)
    return state, dist.get_rank(), x.item()


def fail_on_one(state, where):
    if dist.get_rank() == where:
        raise ValueError("broken here")
    dist.barrier()


def end(state):
    os._exit(3)


def hang(state):
    if dist.get_rank() == 1:
        time.sleep(60)


def test_results_and_failures():
    with Ranks(3, lambda: "state") as ranks:
        assert ranks.call(total, 5) == [("state", rank, 18) for rank in range(3)]
        with pytest.raises(AssertionError, match=r"rank 2 of 3: Traceback(.|\n)*ValueError: broken here\n\nfail_on_one \(2,\)"):
            ranks.call(fail_on_one, 2)
        assert ranks.call(total, 1) == [("state", rank, 6) for rank in range(3)], "the group starts anew"
        with pytest.raises(AssertionError, match=r"rank \d of 3: the process ended without an answer"):
            ranks.call(end)
        began = time.monotonic()
        with pytest.raises(AssertionError, match=r"ranks \[1\] of 3 did not answer within 1 s"):
            ranks.call(hang, timeout=1)
        assert time.monotonic() - began < 30


def test_functions_and_arguments_are_inherited():
    captured = torch.ones(2)
    assert run_on_ranks(2, lambda value: (value() * captured * dist.get_rank()).tolist(), lambda: 7) == [[0, 0], [7, 7]]


def test_processes():
    code = "import os, sys; print(os.environ['RANK'], os.environ['WORLD_SIZE'], sys.argv[1])"
    processes = start_processes([sys.executable, "-c", code, "x"], 2)
    assert outputs_of(processes) == ["0 2 x\n", "1 2 x\n"]
    slow = start_processes([sys.executable, "-c", "import time; print('started', flush=True); time.sleep(60)"], 1)
    with pytest.raises(AssertionError, match=r"not ended within 1 s; output by rank:\nstarted"):
        outputs_of(slow, timeout=1)
