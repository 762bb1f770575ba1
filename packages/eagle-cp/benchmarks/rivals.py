"""Other implementations of context-parallel attention.

Each rival is made into `build(lengths, heads, kv_heads, dim) -> (step, inputs)`. `build` raises `Unavailable` with the reason where the
rival cannot run. `step(q, k, v) -> out` takes local tensors in the layout of the rival. The inputs are random, so the order of tokens does
not matter.
"""

from __future__ import annotations

import contextlib

import torch
import torch.distributed as dist

from benchmarks.rivals import Rival


class Unavailable(Exception):
    """A rival does not take such a pack, or not on so many ranks."""


def _inputs(shape_q, shape_kv):
    return [torch.randn(s, device="cuda", dtype=torch.bfloat16).requires_grad_() for s in (shape_q, shape_kv, shape_kv)]


def usp(ulysses: bool):
    """yunchang (USP): Ulysses, or the zigzag ring, around FlashAttention-2. One document."""

    def make(module_class, set_groups, attention_type):
        def build(lengths, heads, kv_heads, dim):
            if len(lengths) > 1:
                raise Unavailable("its Ulysses and zigzag paths do not take packed documents")
            world, rank = dist.get_world_size(), dist.get_rank()
            set_groups(*((world, 1) if ulysses else (1, world)), rank, world)
            module = module_class(ring_impl_type="basic" if ulysses else "zigzag", attn_type=attention_type.FA)
            local = lengths[0] // world
            return lambda q, k, v: module(q, k, v, causal=True), _inputs((1, local, heads, dim), (1, local, kv_heads, dim))

        return build

    return make


def usp_exchange_with_fa4(attention, exchange):
    """yunchang's all-to-all around flash-attn-4's varlen function: the best public combination."""

    def build(lengths, heads, kv_heads, dim):
        world = dist.get_world_size()
        if kv_heads % world:
            raise Unavailable(f"{kv_heads} key/value heads on {world} ranks")
        local, group = sum(lengths) // world, dist.group.WORLD
        cu = torch.tensor([0, *lengths]).cumsum(0).int().cuda()
        longest = max(lengths)

        def step(q, k, v):
            q, k, v = (exchange.apply(group, x, 2, 1, False) for x in (q, k, v))
            out, *_ = attention(q[0], k[0], v[0], cu_seqlens_q=cu, cu_seqlens_k=cu, max_seqlen_q=longest, max_seqlen_k=longest, causal=True)
            return exchange.apply(group, out[None], 1, 2, False)

        return step, _inputs((1, local, heads, dim), (1, local, kv_heads, dim))

    return build


def torch_context_parallel(cudnn: bool):
    """torch.distributed.tensor.experimental.context_parallel: a ring, or all-gather, around SDPA. One document."""

    def make(init_device_mesh, context_parallel, attention):
        def build(lengths, heads, kv_heads, dim):
            if len(lengths) > 1:
                raise Unavailable("does not take packed documents")
            world = dist.get_world_size()
            inputs = _inputs((1, heads, lengths[0] // world, dim), (1, heads, lengths[0] // world, dim))
            stack = contextlib.ExitStack()
            dummy = torch.zeros(1, 1, 2 * world, 1, device="cuda")
            mesh = init_device_mesh("cuda", (world,))
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

    def build(lengths, heads, kv_heads, dim):
        if len(lengths) > 1:
            raise Unavailable("zigzag varlen needs every document padded to twice the ranks")
        local = lengths[0] // dist.get_world_size()
        inputs = _inputs((1, local, heads, dim), (1, local, kv_heads, dim))
        return lambda q, k, v: attention(q, k, v, causal=True), inputs

    return build


def ring_llama3(prepare, attention):
    """ring-flash-attn's llama3: all-gather of keys and values, packs cut into equal parts, unbalanced."""

    def build(lengths, heads, kv_heads, dim):
        world, rank = dist.get_world_size(), dist.get_rank()
        cu = torch.tensor([0, *lengths]).cumsum(0).int().cuda()
        cu_q, cu_k, max_q, max_k, where = prepare(cu, True, rank, world)
        local = sum(lengths) // world

        def step(q, k, v):
            return attention(q, k, v, cu_q, cu_k, max_q, max_k, heads_k_stride=1, local_k_slice=where, causal=True)

        return step, _inputs((local, heads, dim), (local, kv_heads, dim))

    return build


USP = ("yunchang:LongContextAttention", "yunchang:set_seq_parallel_pg", "yunchang.kernels:AttnType")
TORCH = (
    "torch.distributed.device_mesh:init_device_mesh",
    "torch.distributed.tensor.experimental:context_parallel",
    "torch.nn.attention",
)
LLAMA3 = ("ring_flash_attn:llama3_flash_attn_prepare_cu_seqlens", "ring_flash_attn:llama3_flash_attn_varlen_func")
RIVALS = [
    Rival("USP Ulysses (FA2)", usp(ulysses=True), USP),
    Rival("USP zigzag ring (FA2)", usp(ulysses=False), USP),
    Rival(
        "USP all-to-all + flash-attn-4",
        usp_exchange_with_fa4,
        ("flash_attn.cute:flash_attn_varlen_func", "yunchang.comm.all_to_all:SeqAllToAll4D"),
    ),
    Rival("torch context_parallel (FA2)", torch_context_parallel(cudnn=False), TORCH),
    Rival("torch context_parallel (cuDNN)", torch_context_parallel(cudnn=True), TORCH),
    Rival("ring-flash-attn zigzag (FA2)", ring_zigzag, ("ring_flash_attn:zigzag_ring_flash_attn_func",)),
    Rival("ring-flash-attn llama3 (FA2)", ring_llama3, LLAMA3),
]
