"""Attention in plain torch as the reference, inputs that are the same in every process, and one rank's part of a context-parallel call."""

import itertools

import numpy as np
import torch

from eagle_cp import Layout, attention


def cumulative(lengths):
    return [0, *np.cumsum(lengths).tolist()]


def reference_attention(q, k, v, cu_q, cu_k=None, causal=True, scale=None):
    """Softmax attention, segment by segment. q: [Tq, Hq, D], k, v: [Tk, Hk, D]; any dtype, differentiable.

    cu_k: default: `cu_q`. With fewer queries than keys, queries are the last of their keys.
    """
    group, scale = q.shape[1] // k.shape[1], q.shape[2] ** -0.5 if scale is None else scale
    out = []
    for (a, b), (c, d) in zip(itertools.pairwise(cu_q), itertools.pairwise(cu_q if cu_k is None else cu_k)):
        kd, vd = (x[c:d].repeat_interleave(group, dim=1) for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q[a:b], kd) * scale
        if causal:
            mask = torch.ones(b - a, d - c, dtype=torch.bool, device=q.device)
            scores = scores.masked_fill(mask.triu(1 + (d - c) - (b - a)), -torch.inf)
        out.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), vd))
    return torch.cat(out)


def reference_gradients(q, k, v, dout, *arguments, **options):
    """Output of `reference_attention` in float64 and its gradients: [out, dq, dk, dv]."""
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    out = reference_attention(*exact, *arguments, **options)
    return [out.detach(), *torch.autograd.grad(out, exact, dout.double())]


def tree_keys(lengths, prefixes):
    """Key rows of every document of a pack with its prefix before them, as an index, and their cumulative lengths: `reference_attention`
    with these keys runs every branch as a separate document."""
    cu, index, lengths_k = cumulative(lengths), [], []
    for i, p in enumerate(prefixes):
        rows = [*(range(cu[p], cu[p + 1]) if p >= 0 else ()), *range(cu[i], cu[i + 1])]
        index += rows
        lengths_k.append(len(rows))
    return torch.tensor(index), cumulative(lengths_k)


def tree_reference(q, k, v, dout, lengths, prefixes, **options):
    """Output and gradients in float64, [out, dq, dk, dv], of branches as separate documents; those of a prefix are summed."""
    index, cu_k = tree_keys(lengths, prefixes)
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    out = reference_attention(exact[0], exact[1][index], exact[2][index], cumulative(lengths), cu_k, **options)
    return [out.detach(), *torch.autograd.grad(out, exact, dout.double())]


def make_inputs(case):
    """q, k, v, dout of the whole pack, the same in every process."""
    generator = torch.Generator().manual_seed(case["seed"])
    total, heads, kv_heads, dim = sum(case["lengths"]), case["heads"], case["kv_heads"], case["dim"]
    tensors = [torch.randn(total, h, dim, generator=generator, dtype=torch.float64) for h in (heads, kv_heads, kv_heads, heads)]
    return [x.to(getattr(torch, case.get("dtype", "float64"))) for x in tensors]


def record(mesh):
    """Starts to record the collectives of the groups of `mesh`."""
    for group in mesh.groups():
        group.record = []


def recorded(mesh):
    """{group name: (its ranks, its collectives since `record`)}"""
    return {group.name: (group.ranks, [tuple(call) for call in group.record]) for group in mesh.groups()}


def split_attention(meshes, case):
    """One rank's part: its tokens, local output and gradients, and the record of its collectives."""
    mesh = meshes[case["ulysses"]]
    layout = Layout.build(
        cumulative(case["lengths"]),
        mesh,
        num_heads=case["heads"],
        num_kv_heads=case["kv_heads"],
        tolerance=case.get("tolerance", 0.02),
        prefixes=case.get("prefixes"),
        whole=case.get("whole", False),
    )
    q, k, v, dout = (layout.shard(x) for x in make_inputs(case))
    for x in (q, k, v):
        x.requires_grad_()
    record(mesh)
    out = attention(q, k, v, layout, causal=case["causal"])
    grads = torch.autograd.grad(out, (q, k, v), dout)
    results = [x.detach().double().numpy() for x in (out, *grads)]
    return layout.local_tokens().numpy(), results, recorded(mesh)


def assemble(results, total):
    """Tensors of the whole pack from the results of `split_attention` on all ranks; every token must be on exactly one rank."""
    tokens = np.concatenate([r[0] for r in results])
    assert sorted(tokens[tokens >= 0].tolist()) == list(range(total))
    whole = []
    for parts in zip(*(r[1] for r in results)):
        rows = np.concatenate(parts)
        assert np.all(rows[tokens < 0] == 0), "pad rows must be zero"
        x = np.empty((total, *rows.shape[1:]))
        x[tokens[tokens >= 0]] = rows[tokens >= 0]
        whole.append(torch.from_numpy(x))
    return whole


def assert_same_order(records):
    """Every rank of a group called the same collectives, of the same sizes where sizes must agree, in the same order."""
    by_group = {}
    for groups in records:
        for name, (members, calls) in groups.items():
            by_group.setdefault((name, tuple(members)), []).append(calls)
    for (name, members), calls_of_ranks in by_group.items():
        if len(members) == 1:
            assert calls_of_ranks == [[]] * len(calls_of_ranks), f"{name} of one rank communicates"
            continue
        assert len(calls_of_ranks) == len(members)
        comparable = [[(c[1], c[4], None if c[1] == "all_to_all" else c[3]) for c in calls] for calls in calls_of_ranks]
        assert all(c == comparable[0] for c in comparable), f"order of collectives differs in {name} {members}: {comparable}"
