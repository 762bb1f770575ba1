"""eagle-cp inside a Hugging Face model: a pack of three documents, its tokens split over two ranks (gloo, CPU).

    python examples/context_parallel_in_hf/main.py

Every rank holds a share of the tokens; attention exchanges what it needs, and everything else in a decoder works per token, so the model's
code does not change. Loss and gradients equal those of one process. On GPUs, torchrun starts the ranks and the backend is nccl.
"""

import os
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from transformers import Qwen2Config, Qwen2ForCausalLM

from eagle_cp import ContextMesh, Layout, register_attention

LENGTHS = [700, 40, 260]  # three documents; attention never crosses their borders
IGNORE = -100


def make_model() -> Qwen2ForCausalLM:
    """The same tiny model on every rank, with eagle_cp as its attention."""
    register_attention()  # adds a name to transformers' registry; no model is patched
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=200,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        attn_implementation="eagle_cp",
    )
    return Qwen2ForCausalLM(config).double()


def make_pack() -> tuple[list[int], torch.Tensor, torch.Tensor, torch.Tensor]:
    """cu_seqlens; token ids, targets (each document's next token) and position ids, int64 [T]."""
    cu_seqlens = [0]
    for length in LENGTHS:
        cu_seqlens.append(cu_seqlens[-1] + length)
    ids = torch.randint(200, (cu_seqlens[-1],), generator=torch.Generator().manual_seed(1))
    targets = ids.roll(-1)
    targets[[end - 1 for end in cu_seqlens[1:]]] = IGNORE  # the last token of a document has no next one
    positions = torch.cat([torch.arange(length) for length in LENGTHS])
    return cu_seqlens, ids, targets, positions


def loss_of(model: Qwen2ForCausalLM, layout: Layout) -> torch.Tensor:
    """This rank's part of the loss; the parts of all ranks add up to the mean over all labels of the pack."""
    _, ids, targets, positions = make_pack()
    local_targets = layout.shard(targets, fill=IGNORE)
    logits = model(
        input_ids=layout.shard(ids)[None], position_ids=layout.shard(positions)[None], use_cache=False, eagle_layout=layout
    ).logits[0]
    total = (targets != IGNORE).sum()
    return F.cross_entropy(logits, local_targets, ignore_index=IGNORE, reduction="sum") / total


def gradient_norm(model: Qwen2ForCausalLM) -> float:
    """L2 norm of all gradients."""
    return torch.nn.utils.get_total_norm([p.grad for p in model.parameters()]).item()


def rank_main(rank: int, world: int, folder: str) -> None:
    """What each rank runs: shard, forward, backward, and one sum of gradients over the ranks."""
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", store=dist.FileStore(str(Path(folder) / "store"), world), rank=rank, world_size=world)
    mesh = ContextMesh.from_group(ulysses=1)  # both ranks on the all-gather level; ulysses=2 splits heads instead
    model = make_model()
    layout = Layout.build(make_pack()[0], mesh, num_heads=4, num_kv_heads=2)
    loss = loss_of(model, layout)
    loss.backward()
    total = loss.detach().clone()
    dist.all_reduce(total)
    for parameter in model.parameters():
        dist.all_reduce(parameter.grad)  # summed, since every rank's loss is already divided by the labels of the whole pack
    print(f"rank {rank}: {layout.local_tokens().numel()} of {sum(LENGTHS)} tokens", flush=True)
    if rank == 0:
        torch.save((total.item(), gradient_norm(model)), Path(folder) / "result")
    dist.destroy_process_group()


def main() -> None:
    """Two ranks, then one process, and the comparison."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        # Forked, so that torch and transformers are imported once; with CUDA in use, ranks must be spawned or started by torchrun.
        mp.start_processes(rank_main, args=(2, folder), nprocs=2, start_method="fork")
        split_loss, split_norm = torch.load(Path(folder) / "result")
    model = make_model()
    loss = loss_of(model, Layout.single(make_pack()[0]))
    loss.backward()
    print(f"two ranks:   loss {split_loss:.12f}, gradient norm {split_norm:.12f}")
    print(f"one process: loss {loss.item():.12f}, gradient norm {gradient_norm(model):.12f}")
    assert abs(split_loss - loss.item()) < 1e-10
    assert abs(split_norm - gradient_norm(model)) < 1e-10


if __name__ == "__main__":
    main()
