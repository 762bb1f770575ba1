"""Other implementations of context-parallel attention, each as `make(lengths, heads, kv_heads, dim) -> (step, inputs)`. `make` raises
`Unavailable` with the reason where it can't run.

`step(q, k, v) -> out` takes local tensors in the layout of the rival. The inputs are random, so the order of tokens does not matter.
"""

from __future__ import annotations

import contextlib

import torch
import torch.distributed as dist


class Unavailable(Exception):
    pass


def _inputs(shape_q, shape_kv):
    return [torch.randn(s, device="cuda", dtype=torch.bfloat16).requires_grad_() for s in (shape_q, shape_kv, shape_kv)]


def usp(lengths, heads, kv_heads, dim, *, ulysses: bool):
    """yunchang (USP): Ulysses, or the zigzag ring, around FlashAttention-2. One document."""
    if len(lengths) > 1:
        raise Unavailable("its Ulysses and zigzag paths do not take packed documents")
    from yunchang import LongContextAttention, set_seq_parallel_pg
    from yunchang.kernels import AttnType

    world, rank = dist.get_world_size(), dist.get_rank()
    set_seq_parallel_pg(*((world, 1) if ulysses else (1, world)), rank, world)
    module = LongContextAttention(ring_impl_type="basic" if ulysses else "zigzag", attn_type=AttnType.FA)
    local = lengths[0] // world
    return lambda q, k, v: module(q, k, v, causal=True), _inputs((1, local, heads, dim), (1, local, kv_heads, dim))


def usp_exchange_with_fa4(lengths, heads, kv_heads, dim):
    """yunchang's all-to-all around flash-attn-4's varlen function: the best public combination."""
    from flash_attn.cute import flash_attn_varlen_func
    from yunchang.comm.all_to_all import SeqAllToAll4D

    world = dist.get_world_size()
    if kv_heads % world:
        raise Unavailable(f"{kv_heads} key/value heads on {world} ranks")
    local, group = sum(lengths) // world, dist.group.WORLD
    cu = torch.tensor([0, *lengths]).cumsum(0).int().cuda()

    def step(q, k, v):
        q, k, v = (SeqAllToAll4D.apply(group, x, 2, 1, False) for x in (q, k, v))
        out, *_ = flash_attn_varlen_func(
            q[0], k[0], v[0], cu_seqlens_q=cu, cu_seqlens_k=cu, max_seqlen_q=max(lengths), max_seqlen_k=max(lengths), causal=True
        )
        return SeqAllToAll4D.apply(group, out[None], 1, 2, False)

    return step, _inputs((1, local, heads, dim), (1, local, kv_heads, dim))


def torch_context_parallel(lengths, heads, kv_heads, dim, *, cudnn: bool):
    """torch.distributed.tensor.experimental.context_parallel: a ring, or all-gather, around SDPA; one document."""
    if len(lengths) > 1:
        raise Unavailable("does not take packed documents")
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.experimental import context_parallel
    from torch.nn.attention import SDPBackend, sdpa_kernel

    world = dist.get_world_size()
    mesh = init_device_mesh("cuda", (world,))
    inputs = _inputs((1, heads, lengths[0] // world, dim), (1, heads, lengths[0] // world, dim))
    stack = contextlib.ExitStack()
    dummy = torch.zeros(1, 1, 2 * world, 1, device="cuda")
    stack.enter_context(context_parallel(mesh, buffers=[dummy], buffer_seq_dims=[2]))
    stack.enter_context(sdpa_kernel(SDPBackend.CUDNN_ATTENTION if cudnn else SDPBackend.FLASH_ATTENTION))

    def step(q, k, v):
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)

    step.close = stack.close
    return step, inputs


def ring_zigzag(lengths, heads, kv_heads, dim):
    """ring-flash-attn's zigzag ring around FlashAttention-2."""
    from ring_flash_attn import zigzag_ring_flash_attn_func

    if len(lengths) > 1:
        raise Unavailable("zigzag varlen needs every document padded to twice the ranks")
    local = lengths[0] // dist.get_world_size()
    inputs = _inputs((1, local, heads, dim), (1, local, kv_heads, dim))
    return lambda q, k, v: zigzag_ring_flash_attn_func(q, k, v, causal=True), inputs


def ring_llama3(lengths, heads, kv_heads, dim):
    """ring-flash-attn's llama3: all-gather of keys and values, packs cut into equal parts, unbalanced."""
    from ring_flash_attn import llama3_flash_attn_prepare_cu_seqlens, llama3_flash_attn_varlen_func

    world, rank = dist.get_world_size(), dist.get_rank()
    cu = torch.tensor([0, *lengths]).cumsum(0).int().cuda()
    cu_q, cu_k, max_q, max_k, where = llama3_flash_attn_prepare_cu_seqlens(cu, True, rank, world)
    local = sum(lengths) // world

    def step(q, k, v):
        return llama3_flash_attn_varlen_func(q, k, v, cu_q, cu_k, max_q, max_k, heads_k_stride=1, local_k_slice=where, causal=True)

    return step, _inputs((local, heads, dim), (local, kv_heads, dim))


RIVALS = {
    "USP Ulysses (FA2)": lambda *a: usp(*a, ulysses=True),
    "USP zigzag ring (FA2)": lambda *a: usp(*a, ulysses=False),
    "USP all-to-all + flash-attn-4": usp_exchange_with_fa4,
    "torch context_parallel (FA2)": lambda *a: torch_context_parallel(*a, cudnn=False),
    "torch context_parallel (cuDNN)": lambda *a: torch_context_parallel(*a, cudnn=True),
    "ring-flash-attn zigzag (FA2)": ring_zigzag,
    "ring-flash-attn llama3 (FA2)": ring_llama3,
}
