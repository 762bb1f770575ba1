"""Other implementations of context-parallel attention.

Each rival is made into `build(lengths, shape) -> (step, inputs)`. `build` raises `Unavailable` with the reason where the
rival cannot run. `step(q, k, v) -> out` takes local tensors in the layout of the rival. The inputs are random, so the order of tokens does
not matter.
"""

from __future__ import annotations

import contextlib
import itertools
import math

import torch
import torch.distributed as dist
from measure import Shape, Unavailable

from benchmarks.rivals import Rival


def usp(ulysses: int, ring: int):
    """yunchang (USP): Ulysses x a zigzag ring, around FlashAttention-2. One document; heads that divide by the Ulysses ranks."""

    def make(module_class, set_groups, attention_type):
        def build(lengths, shape):
            if len(lengths) > 1:
                raise Unavailable("its Ulysses and zigzag paths do not take packed documents")
            if shape.heads % ulysses or shape.kv_heads % ulysses:
                raise Unavailable(f"{shape.heads}/{shape.kv_heads} heads on {ulysses} Ulysses ranks")
            world, rank = dist.get_world_size(), dist.get_rank()
            set_groups(ulysses, ring, rank, world)
            kernel = attention_type.FA if shape.device == "cuda" else attention_type.TORCH_MATH
            module = module_class(ring_impl_type="zigzag" if ring > 1 else "basic", attn_type=kernel)
            kv_heads = None if shape.device == "cuda" else shape.heads  # its kernel for CPUs knows no groups of query heads
            return lambda q, k, v: module(q, k, v, causal=True), shape.inputs(1, lengths[0] // world, kv_heads=kv_heads)

        return build

    return make


def exchange_around(attention, exchange):
    """yunchang's all-to-all around flash-attn-4's varlen function: the best public combination.

    Where heads do not divide by the ranks, as users do: key/value heads are repeated, and query heads of zeros are added.
    """

    def build(lengths, shape):
        world = dist.get_world_size()
        local, group = sum(lengths) // world, dist.group.WORLD
        cu = torch.tensor([0, *lengths]).cumsum(0).int().to(shape.device)
        longest = max(lengths)
        repeats, added = padding(shape.heads, shape.kv_heads, world)

        def step(q, k, v):
            if repeats > 1:
                k, v = (x.repeat_interleave(repeats, dim=2) for x in (k, v))
            if added:
                # Each key/value head has as many query heads as before its copies: zeros fill every group up to one size.
                groups = q.unflatten(2, (shape.kv_heads, -1))
                q = torch.nn.functional.pad(groups, (0, 0, 0, added // shape.kv_heads)).flatten(2, 3)
            q, k, v = (exchange.apply(group, x, 2, 1, False) for x in (q, k, v))
            out, *_ = attention(q[0], k[0], v[0], cu_seqlens_q=cu, cu_seqlens_k=cu, max_seqlen_q=longest, max_seqlen_k=longest, causal=True)
            out = exchange.apply(group, out[None], 1, 2, False)
            return out.unflatten(2, (shape.kv_heads, -1))[:, :, :, : shape.heads // shape.kv_heads].flatten(2, 3) if added else out

        return step, shape.inputs(1, local)

    return build


def padding(heads: int, kv_heads: int, ranks: int) -> tuple[int, int]:
    """Copies of every key/value head, and query heads to add, so that both divide by the ranks and groups stay equal."""
    repeats = ranks // math.gcd(kv_heads, ranks)
    in_copies = kv_heads * repeats
    return repeats, -heads % in_copies


def cpu_attention(q, k, v, *, cu_seqlens_q, max_seqlen_q, max_seqlen_k, cu_seqlens_k, causal):
    """With the arguments of flash-attn-4's varlen function, on a CPU."""
    parts = []
    for start, stop in itertools.pairwise(cu_seqlens_q.tolist()):
        one = (x[start:stop].transpose(0, 1)[None] for x in (q, k, v))
        parts.append(torch.nn.functional.scaled_dot_product_attention(*one, is_causal=causal, enable_gqa=True)[0].transpose(0, 1))
    return torch.cat(parts), None


def torch_context_parallel(cudnn: bool):
    """torch.distributed.tensor.experimental.context_parallel: a ring, or all-gather, around SDPA. One document."""

    def make(init_device_mesh, context_parallel, attention):
        def build(lengths, shape):
            if len(lengths) > 1:
                raise Unavailable("does not take packed documents")
            world = dist.get_world_size()
            inputs = shape.inputs(1, lengths[0] // world, axis=-3, kv_heads=shape.heads)  # it knows no groups of query heads
            stack = contextlib.ExitStack()
            dummy = torch.zeros(1, 1, 2 * world, 1, device=shape.device)
            mesh = init_device_mesh(shape.device, (world,))
            stack.enter_context(context_parallel(mesh, buffers=[dummy], buffer_seq_dims=[2]))
            backend = attention.SDPBackend.CUDNN_ATTENTION if cudnn else attention.SDPBackend.FLASH_ATTENTION
            stack.enter_context(attention.sdpa_kernel(backend))

            def step(q, k, v):
                return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)

            step.close = stack.close
            return step, inputs

        return build

    return make


def ring_zigzag(attention):
    """ring-flash-attn's zigzag ring around FlashAttention-2. One document."""

    def build(lengths, shape):
        if len(lengths) > 1:
            raise Unavailable("zigzag varlen needs every document padded to twice the ranks")
        local = lengths[0] // dist.get_world_size()
        inputs = shape.inputs(1, local)
        return lambda q, k, v: attention(q, k, v, causal=True), inputs

    return build


def ring_llama3(prepare, attention):
    """ring-flash-attn's llama3: all-gather of keys and values, packs cut into equal parts, unbalanced."""

    def build(lengths, shape):
        world, rank = dist.get_world_size(), dist.get_rank()
        cu = torch.tensor([0, *lengths]).cumsum(0).int().to(shape.device)
        cu_q, cu_k, max_q, max_k, where = prepare(cu, True, rank, world)
        local = sum(lengths) // world

        def step(q, k, v):
            return attention(q, k, v, cu_q, cu_k, max_q, max_k, heads_k_stride=1, local_k_slice=where, causal=True)

        return step, shape.inputs(local)

    return build


USP = ("yunchang:LongContextAttention", "yunchang:set_seq_parallel_pg", "yunchang.kernels:AttnType")
TORCH = (
    "torch.distributed.device_mesh:init_device_mesh",
    "torch.distributed.tensor.experimental:context_parallel",
    "torch.nn.attention",
)
LLAMA3 = ("ring_flash_attn:llama3_flash_attn_prepare_cu_seqlens", "ring_flash_attn:llama3_flash_attn_varlen_func")
EXCHANGE = "yunchang.comm.all_to_all:SeqAllToAll4D"


def rivals(world: int, shape: Shape) -> list[Rival]:
    """Those that can be on so many ranks: USP in every split, the other ones once."""
    splits = [(u, world // u) for u in range(1, world + 1) if world % u == 0]
    found = [Rival(f"USP u={u} r={r} (FA2)", usp(u, r), USP) for u, r in splits]
    if shape.device == "cpu":
        found.append(Rival("USP all-to-all + torch", lambda exchange: exchange_around(cpu_attention, exchange), (EXCHANGE,)))
        return found
    return [
        *found,
        Rival("USP all-to-all + flash-attn-4", exchange_around, ("flash_attn.cute:flash_attn_varlen_func", EXCHANGE)),
        Rival("torch context_parallel (FA2)", torch_context_parallel(cudnn=False), TORCH),
        Rival("torch context_parallel (cuDNN)", torch_context_parallel(cudnn=True), TORCH),
        Rival("ring-flash-attn zigzag (FA2)", ring_zigzag, ("ring_flash_attn:zigzag_ring_flash_attn_func",)),
        Rival("ring-flash-attn llama3 (FA2)", ring_llama3, LLAMA3),
    ]
