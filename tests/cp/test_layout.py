"""shard and unshard on one rank and many, and errors that are the same on every rank."""

import pytest
import torch
import torch.distributed as dist

from eagle_cp import ContextMesh, Layout, attention, exchange_tiles, plan_tiles
from eagle_cp.layout import agree
from eagle_cp.watchdog import Watchdog
from tests.support.ranks import free_ports
from tests.support.waiting import wait_for

LENGTHS = [50, 3, 1, 17, 8]


def sharding(meshes, case):
    """unshard is the inverse of shard, also of gradients."""
    for mesh in meshes.values():
        total = sum(case)
        layout = Layout.build([0, *torch.tensor(case).cumsum(0).tolist()], mesh, num_heads=8, num_kv_heads=8)
        ids = torch.arange(total)
        local = layout.shard(ids, fill=-100)
        assert local.shape == (layout.local,)
        assert int((local == -100).sum()) == int((layout.local_tokens() < 0).sum())
        assert torch.equal(layout.unshard(local), ids)
        x = torch.randn(2, total, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        assert torch.equal(layout.unshard(layout.shard(x, dim=1), dim=1), x)
        assert torch.equal(layout.unshard(layout.shard(x, dim=-2), dim=-2), x)
        # Every rank's loss depends on all tokens through unshard; the gradient of a row sums over the ranks' losses.
        leaf = layout.shard(x, dim=1).requires_grad_()
        weight = torch.randn(2, total, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        (layout.unshard(leaf, dim=1) * weight).sum().backward()
        torch.testing.assert_close(leaf.grad, layout.shard(weight, dim=1) * mesh.size)
        whole = x.clone().requires_grad_()
        (layout.shard(whole, dim=1) ** 2).sum().backward()
        tokens = layout.local_tokens()
        expected = torch.zeros_like(x)
        expected[:, tokens[tokens >= 0]] = 2 * x[:, tokens[tokens >= 0]]
        torch.testing.assert_close(whole.grad, expected)
    return True


def bad_input(meshes, case):
    """The error of each rank for input that is wrong as `case` says: (kind, the rank where it is wrong or None for all)."""
    kind, bad_rank = case
    mesh = meshes[1]
    wrong = bad_rank is None or mesh.rank == bad_rank
    cu = [0, 5, 3] if kind == "falling" and wrong else [0, 5, 20] if kind == "other" and wrong else [0, 5, 21]
    heads = (6, 4) if kind == "heads" and wrong else (8, 4)
    try:
        layout = Layout.build(cu, mesh, num_heads=heads[0], num_kv_heads=heads[1], verify=bad_rank is not None)
        dtype = torch.int64 if kind == "dtype" and wrong else torch.float32
        rows = layout.local + (kind == "rows" and wrong)
        q, k = torch.ones(rows, 8, 4, dtype=dtype), torch.ones(rows, 4, 4, dtype=dtype)
        attention(q, k, k, layout)
    except ValueError as error:
        return str(error)
    return None


def hang(meshes, folder):
    """Rank 1 comes to a collective when the watchdogs of the others have reported that it is late."""
    mesh, reports = meshes[1], []
    store = dist.FileStore(str(folder / "store"), mesh.size)

    def report(text):
        reports.append(text)
        (folder / f"reported-{mesh.rank}").touch()

    with Watchdog(mesh.groups(), timeout=0.3, store=store, report=report):
        if mesh.rank == 1:
            wait_for(lambda: all((folder / f"reported-{rank}").exists() for rank in (0, 2)))
        before = list(reports)
        mesh.context.all_gather_rows(torch.zeros(3))
    return before if mesh.rank == 1 else reports


def lost_store(meshes, folder):
    """The host of the store (rank 0) closes it, and comes to a collective when rank 1 has reported that it waits."""
    mesh, reports = meshes[1], []
    port = torch.tensor(free_ports(1))
    port = int(mesh.context.all_gather_rows(port)[0])
    store = dist.TCPStore("127.0.0.1", port, mesh.size, is_master=mesh.rank == 0)

    def report(text):
        reports.append(text)
        (folder / f"reported-{mesh.rank}").touch()
        raise OSError("no space left for reports")

    mesh.context.all_gather_rows(torch.zeros(3))
    with Watchdog(mesh.groups(), timeout=0.3, store=store if mesh.rank else None, report=report) as watchdog:
        if mesh.rank == 0:
            del store
            wait_for((folder / "reported-1").exists)
        mesh.context.all_gather_rows(torch.zeros(4))
        return reports, watchdog._thread.is_alive()


def wrong_tiles(meshes, case):
    """The error of each rank when rank 1 has other tiles, or another mask."""
    kind, mesh = case, meshes[1]
    wrong = mesh.rank == 1
    layout = Layout.build([0, 12], mesh, num_heads=2, num_kv_heads=2, verify=True)
    is_feature = torch.arange(12) < {"mask": 6, "multiple": 7}.get(kind, 8) if wrong else torch.arange(12) < 8
    try:
        plan = plan_tiles(layout, is_feature, 2)
        rows = (plan.last - plan.first) * 2 + 2 * (wrong and kind == "tiles")
        rows = exchange_tiles(torch.zeros(rows, 3 + (wrong and kind == "width")), layout, plan)
        for _ in range(2):  # agreed once
            rows = exchange_tiles(torch.zeros((plan.last - plan.first) * 2, 3), layout, plan)
        return rows.shape[0] == len(plan.local_rows)
    except ValueError as error:
        return str(error)


def test_single_is_the_identity():
    layout = Layout.single(torch.tensor([0, 4, 9]))
    x = torch.randn(9, 2)
    assert layout.shard(x) is x
    assert layout.unshard(x) is x
    assert (layout.total, layout.local, layout.pad, layout.cu_seqlens) == (9, 9, 0, (0, 4, 9))
    alone = Layout.build([0, 4, 9], ContextMesh.single(), num_heads=3, num_kv_heads=1)
    assert alone.shard(x) is x
    assert torch.equal(alone.order(), torch.arange(9))


@pytest.mark.parametrize("size", [2, 3, 4])
def test_shard_and_unshard(ranks, size):
    for case in (LENGTHS, [1], [64], [1] * 7):
        assert all(ranks(size).call(sharding, case))


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("falling", "document 1 has length -2"),
        ("heads", "6 query heads can't share 4 key/value heads"),
        ("dtype", "no kernel for int64"),
        ("rows", "tokens, the layout"),
    ],
)
def test_bad_input_is_the_same_error_on_every_rank(ranks, kind, message):
    everywhere = ranks(3).call(bad_input, (kind, None))
    assert len(set(everywhere)) == 1
    assert message in everywhere[0]
    # Wrong on one rank only: with verify=True every rank raises, and names it.
    one = ranks(3).call(bad_input, (kind, 2))
    assert len(set(one)) == 1
    assert "context rank 2: " in one[0]
    assert message in one[0]


def test_ranks_that_disagree_are_named(ranks):
    errors = ranks(3).call(bad_input, ("other", 1))
    assert len(set(errors)) == 1
    assert "[0, 2] / [1]" in errors[0]


def test_watchdog_reports_who_waits_for_what(ranks, tmp_path):
    reports = ranks(3).call(hang, tmp_path)
    for rank in (0, 2):
        text = "\n".join(reports[rank])
        assert f"rank {rank} has waited" in text
        assert "all_gather number" in text
        assert "rank 1: not in a collective" in text or "rank 1: has called no collective yet" in text
    assert reports[1] == []


def test_watchdog_outlives_its_store_and_its_report(ranks, tmp_path):
    (_, alive), (reports, still_alive) = ranks(2).call(lost_store, tmp_path)
    assert alive
    assert still_alive
    assert len(reports) == 1
    assert "rank 1 has waited" in reports[0]
    assert "all_gather number" in reports[0]


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("mask", "plan_tiles: is_feature or tokens_per_tile differ between context ranks: [0, 2] / [1]"),
        ("multiple", "context rank 1: plan_tiles: 7 feature tokens are not a multiple of 2"),
        ("tiles", "context rank 1: exchange_tiles: got features (4, 3), this rank encodes tiles [1, 2) of 4"),
        ("width", "exchange_tiles: dtype or width of the features differ between context ranks: [0, 2] / [1]"),
    ],
)
def test_wrong_tiles_of_one_rank_are_an_error_of_all(ranks, kind, message):
    errors = ranks(3).call(wrong_tiles, kind)
    assert len(set(errors)) == 1
    assert message in errors[0]
    assert ranks(3).call(wrong_tiles, None) == [True] * 3


def test_agreement_of_one():
    agree(ContextMesh.single(), None, "facts", "what")
    with pytest.raises(ValueError, match="context rank 0: broken"):
        agree(ContextMesh.single(), "broken", "facts", "what")


@pytest.mark.parametrize(
    ("cu", "message"),
    [
        ([0], "expected"),
        ([1, 2], "expected"),
        ([0, 2, 2], "document 1 has length 0"),
        ([0, 3, 1], "document 1 has length -2"),
        ([0, 2.7, 5], r"cu_seqlens: expected integers, got 2\.7"),
        (torch.tensor([0.0, 3.0]), r"cu_seqlens: expected integers, got 0\.0"),
        ([[0, 3]], r"cu_seqlens: expected integers, got \[0, 3\]"),
    ],
)
def test_lengths_that_do_not_add_up(cu, message):
    with pytest.raises(ValueError, match=message):
        Layout.single(cu)


def test_shard_of_the_wrong_length():
    layout = Layout.build([0, 4], ContextMesh.single(), num_heads=1, num_kv_heads=1)
    with pytest.raises(ValueError, match="should have the pack's 4 tokens"):
        layout.shard(torch.zeros(3))


@pytest.mark.parametrize(("x", "dim"), [(torch.arange(10), 1), (torch.tensor(5), 0), (torch.arange(10), -2)])
def test_a_dimension_that_is_not_there_is_refused(x, dim):
    layout = Layout.single([0, 7, 10])
    with pytest.raises(ValueError, match=f"shard: dimension {dim} of"):
        layout.shard(x, dim)
    with pytest.raises(ValueError, match=f"unshard: dimension {dim} of"):
        layout.unshard(x, dim)
