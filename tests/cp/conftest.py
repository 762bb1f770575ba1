"""Groups of gloo ranks for the tests: forked once per module after torch is imported (starting Python anew costs seconds), fed through
pipes."""

from __future__ import annotations

import contextlib
import gc
import itertools
import multiprocessing
import os
import tempfile
import traceback
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from eagle_cp import ContextMesh, Layout, attention

torch.set_num_threads(1)
# The first gradient makes torch import sympy; here once, instead of in every forked rank.
torch.autograd.grad((_x := torch.ones(1, requires_grad=True)) * 2, _x, torch.ones(1))


def reference_attention(q, k, v, cu_seqlens, causal=True, scale=None):
    """Plain softmax attention per document. q: [T, Hq, D], k, v: [T, Hk, D]; any dtype, differentiable."""
    group, scale = q.shape[1] // k.shape[1], q.shape[2] ** -0.5 if scale is None else scale
    out = []
    for a, b in itertools.pairwise(cu_seqlens):
        kd, vd = (x[a:b].repeat_interleave(group, dim=1) for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q[a:b], kd) * scale
        if causal:
            scores = scores.masked_fill(torch.ones(b - a, b - a, dtype=torch.bool).triu(1), -torch.inf)
        out.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), vd))
    return torch.cat(out)


def make_inputs(case):
    """q, k, v, dout of the whole pack, the same in every process."""
    generator = torch.Generator().manual_seed(case["seed"])
    total, heads, kv_heads, dim = sum(case["lengths"]), case["heads"], case["kv_heads"], case["dim"]
    tensors = [torch.randn(total, h, dim, generator=generator, dtype=torch.float64) for h in (heads, kv_heads, kv_heads, heads)]
    return [x.to(getattr(torch, case.get("dtype", "float64"))) for x in tensors]


def cumulative(lengths):
    return [0, *np.cumsum(lengths).tolist()]


def run_attention(meshes, case):
    """One rank's part: local outputs and gradients, its tokens, and the record of its collectives."""
    mesh = meshes[case["ulysses"]]
    layout = Layout.build(
        cumulative(case["lengths"]), mesh, num_heads=case["heads"], num_kv_heads=case["kv_heads"], tolerance=case.get("tolerance", 0.02)
    )
    q, k, v, dout = (layout.shard(x) for x in make_inputs(case))
    for x in (q, k, v):
        x.requires_grad_()
    for group in mesh.groups():
        group.record = []
    out = attention(q, k, v, layout, causal=case["causal"])
    grads = torch.autograd.grad(out, (q, k, v), dout)
    record = {group.name: (group.ranks, [tuple(c) for c in group.record]) for group in mesh.groups()}
    results = [x.detach().double().numpy() for x in (out, *grads)]
    return layout.local_tokens().numpy(), results, record


class Ranks:
    """`size` forked gloo ranks. `call(name, case)` runs `functions[name](meshes, case)` on every rank and gives the list of results.

    `meshes[u]` is the ContextMesh with Ulysses size `u`, for every divisor of `size`.
    """

    def __init__(self, size, functions):
        self.size = size
        self.folder = tempfile.TemporaryDirectory()
        context = multiprocessing.get_context("fork")
        self.pipes, self.processes = [], []
        gc.collect()
        for rank in range(size):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve, args=(rank, size, str(Path(self.folder.name, "store")), theirs, functions), daemon=True
            )
            process.start()
            self.pipes.append(ours)
            self.processes.append(process)

    def call(self, name, case=None, timeout=60):
        for pipe in self.pipes:
            pipe.send((name, case))
        results = []
        for rank, pipe in enumerate(self.pipes):
            assert pipe.poll(timeout), f"rank {rank} of {self.size} did not answer within {timeout} s: {name} {case}"
            ok, value = pipe.recv()
            assert ok, f"rank {rank} of {self.size}: {value}\n{name} {case}"
            results.append(value)
        return results

    def close(self):
        for pipe in self.pipes:
            with contextlib.suppress(OSError):
                pipe.send(None)
        for process in self.processes:
            process.join(5)
            if process.is_alive():
                process.terminate()
        self.folder.cleanup()


def _serve(rank, size, store_path, pipe, functions):
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    store = dist.FileStore(store_path, size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
    meshes = {u: ContextMesh.from_group(ulysses=u) for u in range(1, size + 1) if size % u == 0}
    while True:
        message = pipe.recv()
        if message is None:
            break
        name, case = message
        try:
            pipe.send((True, functions[name](meshes, case)))
        except BaseException:
            pipe.send((False, traceback.format_exc()))
    os._exit(0)


@pytest.fixture(scope="module")
def ranks(request):
    """`ranks(size)`: a group of that size that lives as long as the module; extra functions from the module's `FUNCTIONS`."""
    groups = {}
    functions = getattr(request.module, "FUNCTIONS", {})
    functions["attention"] = run_attention

    def get(size):
        if size not in groups:
            groups[size] = Ranks(size, functions)
        return groups[size]

    yield get
    for group in groups.values():
        group.close()


def assemble(results, total):
    """Tensors of the whole pack from what the ranks returned; every token must be there exactly once."""
    tokens = np.concatenate([r[0] for r in results])
    assert sorted(tokens[tokens >= 0].tolist()) == list(range(total))
    whole = []
    for parts in zip(*(r[1] for r in results)):
        rows = np.concatenate(parts)
        assert np.all(rows[tokens < 0] == 0), "pad rows must stay zero"
        x = np.empty((total, *rows.shape[1:]))
        x[tokens[tokens >= 0]] = rows[tokens >= 0]
        whole.append(torch.from_numpy(x))
    return whole


def same_order(results):
    """Every rank of a group called the same collectives, of the same sizes where sizes must agree, in the same order."""
    by_group = {}
    for _, _, record in results:
        for name, (members, calls) in record.items():
            by_group.setdefault((name, tuple(members)), []).append(calls)
    for (name, members), records in by_group.items():
        if len(members) == 1:
            assert records == [[]] * len(records), f"{name} of one rank communicates"
            continue
        assert len(records) == len(members)
        comparable = [[(c[1], c[4], None if c[1] == "all_to_all" else c[3]) for c in calls] for calls in records]
        assert all(c == comparable[0] for c in comparable), f"order of collectives differs in {name} {members}: {comparable}"


@pytest.fixture(scope="session")
def cp():
    """The helpers above, for test modules (which can't import a conftest by name)."""

    class Helpers:
        reference = staticmethod(reference_attention)
        inputs = staticmethod(make_inputs)
        cumulative = staticmethod(cumulative)
        assemble = staticmethod(assemble)
        same_order = staticmethod(same_order)

    return Helpers
