"""What measures a whole host: packs and rivals of any number of ranks, the planner's verdict, shares of communication, and the driver."""

import importlib
import json
import os
import subprocess
import sys
import time
from functools import partial
from itertools import accumulate
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.environment import environment
from benchmarks.results import Result
from tests.support.ranks import Ranks

ROOT = Path(__file__).parents[2]
CP, TRAIN = ROOT / "packages/eagle-cp/benchmarks", ROOT / "packages/eagle-train/benchmarks"
NAMES = (
    "packs",
    "measure",
    "predicted",
    "rivals",
    "communication",
    "context_step",
    "host",
    "host_summary",
    "parts",
    "scaling",
    "rows",
    "processes",
    "run",
)


@pytest.fixture
def script(monkeypatch):
    """Imports a script of a folder; scripts import each other by their names alone, so they are forgotten afterwards."""
    pytest.importorskip("triton")

    def load(folder, name):
        monkeypatch.syspath_prepend(str(folder))
        return importlib.import_module(name)

    yield load
    for name in NAMES:
        sys.modules.pop(name, None)


# ---- packs and rivals


def test_packs_have_the_tokens_of_their_names(script):
    packs = script(CP, "packs")
    sizes = [packs.parse(size) for size in ("64K", "1M", "131072")]
    assert sizes == [65536, 1 << 20, 131072]
    for name, make in packs.packs(sizes).items():
        total = sum(make(1))
        named = [packs.parse(word) for word in name.replace(",", "").split() if word in ("64K", "128K", "1M")]
        assert total == named[0] + (200 * 512 if "short" in name else 0) if named else total in sizes, name
        assert len(make(256)) == len(make(1))
        assert min(make(256)) >= 1
    for wrong in ("", "64k", "1000", "-4096", "0", "1G"):
        with pytest.raises(ValueError, match="size of packs"):
            packs.parse(wrong)


@settings(max_examples=60, deadline=None)
@given(group=st.integers(1, 9), kv_heads=st.integers(1, 8), ranks=st.integers(1, 16))
def test_padded_heads_divide_by_the_ranks_in_equal_groups(group, kv_heads, ranks):
    sys.path.insert(0, str(CP))
    try:
        repeats, added = importlib.import_module("rivals").padding(group * kv_heads, kv_heads, ranks)
    finally:
        sys.path.remove(str(CP))
    heads = group * kv_heads + added
    assert kv_heads * repeats % ranks == 0
    assert heads % (kv_heads * repeats) == 0
    assert added % kv_heads == 0
    assert added < kv_heads * repeats


class Exchange(torch.autograd.Function):
    """A plain all-to-all with the arguments of yunchang's."""

    @staticmethod
    def forward(ctx, group, x, scatter, gather, use_sync=False):
        ctx.axes = scatter, gather
        parts = torch.stack(x.chunk(dist.get_world_size(), dim=scatter))
        received = torch.empty_like(parts)
        dist.all_to_all_single(received, parts)
        return torch.cat(list(received), dim=gather)

    @staticmethod
    def backward(ctx, grad):
        scatter, gather = ctx.axes
        return None, Exchange.apply(None, grad, gather, scatter), None, None, None


def rival_on_ranks(_, lengths):
    """The rival's output and gradients on this rank's part, and those of the whole pack."""
    sys.path.insert(0, str(CP))
    measure, rivals = importlib.import_module("measure"), importlib.import_module("rivals")
    shape = measure.Shape(14, 2, 8, torch.float64, "cpu")
    world, rank = dist.get_world_size(), dist.get_rank()
    step, inputs = rivals.exchange_around(rivals.cpu_attention, Exchange)(lengths, shape)
    local = sum(lengths) // world
    torch.manual_seed(0)
    whole = [torch.randn(1, sum(lengths), h, 8, dtype=torch.float64, requires_grad=True) for h in (14, 2, 2)]
    mine = [x.detach()[:, rank * local : (rank + 1) * local].clone().requires_grad_() for x in whole]
    assert [x.shape for x in inputs] == [x.shape for x in mine]
    cu = torch.tensor([0, *accumulate(lengths)])
    expected = rivals.cpu_attention(*(x[0] for x in whole), cu_seqlens_q=cu, cu_seqlens_k=cu, max_seqlen_q=0, max_seqlen_k=0, causal=True)[
        0
    ][None]
    out = step(*mine)
    weight = torch.randn(expected.shape, dtype=torch.float64)
    part = slice(rank * local, (rank + 1) * local)
    grads = torch.autograd.grad((out * weight[:, part]).sum(), mine)
    wanted = torch.autograd.grad((expected * weight).sum(), whole)
    errors = [(out - expected[:, part]).abs().max().item()]
    return errors + [(grad - want[:, part]).abs().max().item() for grad, want in zip(grads, wanted)]


def test_the_all_to_all_rival_is_attention_also_where_heads_do_not_divide(script):
    script(CP, "rivals")
    with Ranks(8) as ranks:  # 14/2 heads: copies of keys and values, and query heads of zeros
        for errors in ranks.call(rival_on_ranks, [40, 3, 21]):
            assert max(errors) < 1e-12


# ---- the planner


def test_the_verdict_on_the_planner(script):
    predicted, measure = script(CP, "predicted"), script(CP, "measure")
    result = Result("eagle-cp/bench", environment([]), measure.METRICS | predicted.METRICS)
    estimates = predicted.candidates([65536], 8, 28, 4, 128)
    assert set(estimates) == {f"ours u={u} r={8 // u}" for u in (1, 2, 4, 8)}
    assert "ours whole r=8" in predicted.candidates([4096] * 32, 8, 28, 4, 128)
    for pack, factors in {"right": (1.0, 1.0, 1.0, 1.0), "slow": (1.0, 1.2, 1.0, 1.0), "one": (1.0,)}.items():
        for (name, estimate), factor in zip(sorted(estimates.items(), key=lambda item: item[1].total_ms), factors):
            both = estimate.total_ms * factor
            result.add(pack, f"{name}, flash-attn-4", both_ms=both, **predicted.planned(estimate, both))
        result.add(pack, "ours u=1 r=8, cudnn", both_ms=1.0)
    missed = predicted.judge(result, ["right", "slow", "one", "other"])
    assert len(missed) == 1
    assert missed[0].startswith("slow: ours u=")
    assert "+20.0%" in missed[0]
    verdicts = {case.case: case.metrics for case in result.cases if case.contender == predicted.CHOICE}
    assert set(verdicts) == {"right", "slow"}
    assert verdicts["right"] == {"choice_over_best": 1.0, "largest_error": pytest.approx(0.0)}
    chosen = next(case for case in result.cases if case.case == "right" and "planned_ms" in case.metrics)
    chosen.metrics["both_ms"] *= 1.1
    assert any(
        "was chosen" in text for text in predicted.judge(Result("a/b", result.environment, result.metrics, [*result.cases[:4]]), ["right"])
    )


# ---- communication


def test_shares_of_communication(script):
    shares = script(TRAIN, "communication").shares
    # compute 0-4 and 6-8, collectives 3-5 and 3.5-4.5 and 9-10: they run for 3 of 10, alone for 2, and nothing runs for 2.
    found = shares([(3.0, 5.0), (3.5, 4.5), (9.0, 10.0)], [(0.0, 2.0), (2.0, 4.0), (6.0, 8.0), (6.5, 7.0)])
    assert found == pytest.approx((0.3, 0.2, 0.2))
    assert shares([], []) == (0.0, 0.0, 0.0)
    assert shares([], [(1.0, 2.0)]) == (0.0, 0.0, 0.0)


# ---- the driver


@pytest.fixture
def host(script, tmp_path):
    module = script(TRAIN, "host")
    return module, module.Host(8, True, tmp_path)


@pytest.mark.parametrize("limit", [100_000, 786_432, 1 << 20, 1_400_000, 5_000_000])
def test_the_longest_sequence_is_found_to_an_eighth(host, limit):
    module, made = host
    tried = []

    def trial(tokens, seconds):
        tried.append(tokens)
        return tokens <= limit

    found = module.longest(made, 1e6, trial=trial)
    assert found["complete"]
    assert found["tokens"] <= limit < found["tokens"] * 1.25 + 4096
    assert len(tried) == len(set(tried)) <= 10


def test_the_search_says_what_it_found_when_the_time_is_up_or_nothing_trains(host, monkeypatch):
    module, made = host
    assert module.longest(made, 1e6, trial=lambda *_: False)["tokens"] == 0
    clock = iter(range(0, 100_000, 400))
    monkeypatch.setattr(module.time, "monotonic", lambda: float(next(clock)))
    found = module.longest(made, 1000.0, trial=lambda *_: True)
    assert (found["complete"], found["tokens"]) == (False, 2 << 20)


def test_a_part_that_fails_or_hangs_does_not_stop_the_others(host):
    module, made = host
    python = partial(lambda code: [sys.executable, "-c", code])
    slow = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
    parts = [
        module.Part("bad", python("raise SystemExit(5)"), 20),
        module.Part("slow", python(slow), 1),
        module.Part("good", python(""), 20),
    ]
    begin = time.monotonic()
    for part in parts:
        module.record(made, part.name, module.run(part, made.out, part.seconds))
    assert time.monotonic() - begin < 45
    status = json.loads((made.out / "status.json").read_text())["parts"]
    assert [found["ended"] for found in status.values()] == ["exit code 5", "stopped after 1 s", "complete"]
    assert "| slow | stopped after 1 s |" in (made.out / "README.md").read_text()


def test_parts_are_the_same_for_any_number_of_gpus(host):
    module, made = host
    for gpus in (1, 2, 8):
        made.gpus = gpus
        names = [part.name for part in module.parts(made)]
        assert names[0] == "check"
        assert f"scaling-{gpus}" in names
        assert len(names) == len(set(names))
        for part in module.parts(made):
            assert any((ROOT / word).is_file() for word in part.command), part.command


def test_the_page_of_a_host_judges_its_aims(script, host, tmp_path):
    from benchmarks.results import write

    summary, metrics = script(TRAIN, "host_summary"), script(TRAIN, "scaling").METRICS | script(TRAIN, "context_step").METRICS
    metrics |= script(CP, "predicted").METRICS | script(TRAIN / "kills", "run").METRICS
    contents = {
        "attention-64K": [("one", "plan_context", {"largest_error": -0.2, "choice_over_best": 1.0}), ("one", "ours", {"step_s": 1.0})],
        "step-1M": [("1024K, 8 ranks", "ours, u=4 r=2, selective", {"tokens_per_s": 600.0, "mfu": 0.5, "reserved_gib": 70.0})],
        "scaling-1": [("one-32k, 1 GPU", "ours", {"tokens_per_s": 1000.0})],
        "scaling-8": [("data-32k, 8 GPUs", "ours", {"tokens_per_s": 950.0}), ("context-128k, 8 GPUs", "ours", {"tokens_per_s": 1.0})],
        "kills": [("kill 1: step", "ours", {"ended_s": 3.0, "errors": 1}), ("end", "ours", {"records_equal": 1, "weights_equal": 0})],
    }
    for name, cases in contents.items():
        result = Result("a/b", environment([]), metrics)
        for case, contender, figures in cases:
            result.add(case, contender, **figures)
        write(result, tmp_path / f"{name}.json")
    done = {name: {"ended": "complete", "seconds": 1.0} for name in [*contents, "check"]}
    text = summary.page(tmp_path, done | {"longest": {"ended": "complete", "seconds": 2.0, "tokens": 1 << 20, "tried": {"1024K": True}}})
    for line in ("| one | -20.0% | 1.000 | missed |", "| 8 | 950 | 0.95 | met |", "| end |  |  | no |", "1048576 tokens train (1024K)"):
        assert line in text, text
    assert "| 1024K, 8 ranks | ours, u=4 r=2, selective | 600 | 0.5 | 70 |  |  |" in text
    assert "context-128k" not in text


def test_the_driver_refuses_results_of_another_host(host, tmp_path):
    module, made = host
    module.record(made, "check", {"ended": "complete", "seconds": 1.0})
    command = [sys.executable, str(TRAIN / "host.py"), "--out", str(tmp_path), "--small", "--gpus", "2", "--only", "check"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert "is of 8 GPUs, --small; choose another --out" in done.stderr


# ---- kills


def test_the_runs_to_disturb_are_valid_and_mix_all_media(script, tmp_path):
    from eagle_train.config import parse_config

    rows = script(TRAIN / "kills", "rows")
    for size in rows.SIZES.values():
        for ranks, shared in ((8, 4), (4, 4), (2, 2), (1, 1)):
            config = parse_config(rows.configuration("run", size, ranks, 50))
            assert config.parallel.group_size == shared
            assert sum(stage.steps for stage in config.stages) == 50
    rows.write_rows(tmp_path, rows.SIZES["tiny"])
    images = json.loads((tmp_path / "images.jsonl").read_text().splitlines()[0])
    assert len(images["image"]) == images["conversations"][0]["value"].count("<image>") >= 200


def test_processes_of_a_command_are_found_by_rank(script, tmp_path):
    processes = script(TRAIN / "kills", "processes")
    path = tmp_path / "media" / "file"
    path.parent.mkdir()
    path.touch()
    reader = f"import time; f = open({str(path)!r}); time.sleep(60)"
    code = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {reader!r}]).wait()"
    found = processes.Processes(f"test-{os.getpid()}")
    environment = os.environ | {processes.MARK: f"test-{os.getpid()}", "RANK": "3"}
    rank = subprocess.Popen([sys.executable, "-c", code], env=environment)
    try:
        deadline = time.monotonic() + 20
        while not any(processes.has_open(number, path.parent) for number in found.of(3)) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert found.rank(3) == rank.pid
        assert found.rank(2) is None
        assert len(found.of(3)) == 2
    finally:
        assert found.end(patience=0.0) == 2
        rank.wait()
    assert found.end() == 0


def test_what_counts_as_a_bad_end(script):
    run = script(TRAIN / "kills", "run")
    good = {"ended_s": 9.0, "exit_code": 137.0, "left": 0.0, "errors": 1.0, "named_s": 61.0}
    assert run.broken(good) == []
    for change in ({"ended_s": 61.0}, {"exit_code": 0}, {"left": 1}, {"errors": 0}, {"errors": 2}, {"named_s": 100.0}, {"went_on_s": 90.0}):
        assert len(run.broken(good | change)) == 1, change


@pytest.mark.slow
def test_a_run_whose_ranks_are_killed(tmp_path):
    """The real command on two ranks: each kill ends it with one error, and the run that continues equals one that was not disturbed."""
    script, out = str(TRAIN / "kills/run.py"), str(tmp_path / "kills.json")
    options = [
        "--ranks",
        "2",
        "--device",
        "cpu",
        "--steps",
        "10",
        "--kills",
        "3",
        "--moments",
        "step",
        "checkpoint",
        "reader",
        "--out",
        out,
    ]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, script, *options], env=environment, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    cases = {case["case"]: case["metrics"] for case in json.loads(Path(out).read_text())["cases"]}
    assert cases["kill 1: step"]["errors"] == 1
    assert cases["continued to the end"]["records_equal"] == cases["continued to the end"]["weights_equal"] == 1
