"""A rank that fails is the only one that reports; one that was killed is reported by the others."""

import pytest
import torch
import torch.distributed as dist

from eagle_train.cli.main import report
from eagle_train.config import ConfigError
from eagle_train.distributed.failure import KEY, is_lost, launcher_reports, leave
from tests.support.ranks import Ranks

GLOO = "[pair.cc:561] Connection closed by peer [127.0.0.1]:5761. This is typically caused by a remote worker crashing."


def fail(_, path):
    """Rank 1 fails while rank 0 waits for it."""
    rank, store = dist.get_rank(), dist.FileStore(path, 2)
    dist.barrier()
    try:
        if rank == 1:
            raise ValueError("the disk is full")
        dist.all_reduce(torch.ones(1))
    except (ValueError, RuntimeError) as error:
        leave(store, rank, error)
        if rank == 1:
            dist.destroy_process_group()
        lost = getattr(error, "lost_rank", None)
        return None if lost is None else (lost.reporter, lost.message)


def test_the_rank_that_lost_another_leaves_the_report_to_it(tmp_path):
    with Ranks(2) as ranks:
        waiting, failing = ranks.call(fail, str(tmp_path / "store"))
    assert failing is None
    assert waiting[0] == "rank 1"


def test_a_rank_that_was_killed_is_reported_by_the_other():
    store = dist.HashStore()
    error = RuntimeError(GLOO)
    leave(store, 0, error, patience=0.2)
    assert error.lost_rank.reporter is None
    assert "rank 0 lost its connection to another rank, which ended without a message: it was killed" in error.lost_rank.message
    leave(None, 0, error, patience=0.2)
    assert error.lost_rank.reporter is None


def test_one_of_several_ranks_reports_a_killed_one(monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    store, errors = dist.HashStore(), [RuntimeError(GLOO) for _ in range(3)]
    for rank, error in enumerate(errors):
        leave(store, rank, error, patience=0.05)
    assert [error.lost_rank.reporter for error in errors] == [None, "another rank", "another rank"]


def test_torchrun_reports_a_killed_rank_that_it_started(monkeypatch):
    local = {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "8"}
    assert launcher_reports(local)
    assert not launcher_reports(local | {"LOCAL_WORLD_SIZE": "4"})
    assert not launcher_reports({"WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "8"})
    for name, value in local.items():
        monkeypatch.setenv(name, value)
    leave(dist.HashStore(), 0, error := RuntimeError(GLOO), patience=0.05)
    assert error.lost_rank.reporter == "torchrun"


class GoneStore:
    """The process that had the store has ended."""

    def check(self, _):
        raise dist.DistNetworkError("failed to recv, got 0 bytes")


def test_a_rank_without_the_store_says_where_to_look(monkeypatch):
    """Rank 0 may have failed with a message of its own, and took the store along: nobody can say that it was killed."""
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    leave(GoneStore(), 3, error := RuntimeError(GLOO))
    assert error.lost_rank.reporter is None
    text = "rank 3 lost its connection to rank 0, whose process ended. If rank 0 printed an error, that is the cause; else it was killed"
    assert error.lost_rank.message.startswith(text)


def test_what_says_that_a_rank_is_gone():
    assert is_lost(RuntimeError(GLOO))
    assert is_lost(dist.DistNetworkError("failed to recv, got 0 bytes"))
    assert not is_lost(RuntimeError("shapes differ"))
    assert not is_lost(ValueError("Connection closed by peer"))


@pytest.mark.parametrize("everywhere", [False, True])
def test_an_error_is_published_by_the_rank_that_has_it(everywhere):
    store, error = dist.HashStore(), ConfigError("no")
    error.on_every_rank = everywhere
    leave(store, 3, error)
    assert store.check([KEY]) != everywhere
    assert not hasattr(error, "lost_rank")


def test_reports(capsys, monkeypatch):
    error, store = RuntimeError(GLOO), dist.HashStore()
    store.set(KEY, "rank 1")
    leave(store, 0, error)
    report(error)
    assert capsys.readouterr().err == ""
    alone = RuntimeError(GLOO)
    leave(dist.HashStore(), 0, alone, patience=0.1)
    report(alone)
    assert capsys.readouterr().err.startswith("error: rank 0 lost its connection to another rank")
