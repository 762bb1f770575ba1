"""The same training step by public packages: transformers' InternVL of our sizes, Liger's operators, flash-attn-4, a checkpoint a layer.

The loss is Liger's fused linear cross-entropy over the rows that have labels.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.results import Result, write
from benchmarks.rivals import Absent
from eagle_model import PackedBatch

from .inputs import described, one_sequence
from .inputs import make as make_model
from .measured import GIB, log, milliseconds, release

NAME = "transformers + Liger + flash-attn-4"
PLAIN_NAME = "transformers, torch's attention and loss"
ATTENTION = "causal_fa4"  # a name with "flash" would be looked for on the hub


def _attention(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, scaling: float | None = None, **_: Any) -> Any:
    """transformers' interface: query [B, heads, T, D], key and value [B, kv_heads, T, D] -> [B, T, heads, D]; causal."""
    from flash_attn.cute.interface import flash_attn_func

    q, k, v = (one.transpose(1, 2) for one in (query, key, value))
    out = flash_attn_func(q, k, v, softmax_scale=scaling, causal=True)
    return out[0] if isinstance(out, tuple) else out, None


class Public(NamedTuple):
    """A contender: makes the model from a configuration, and gives the loss of a model and a pack."""

    name: str
    make: Callable[[Any], Any]
    loss: Callable[[Any, PackedBatch], Tensor]


def internvl(config: Any) -> Any:
    """The configuration of transformers' InternVL with the sizes of `config`, with torch's attention."""
    from transformers import InternVLConfig

    vision, text = config.vision_config, config.text_config.to_dict()
    fields = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "image_size", "patch_size")
    like = InternVLConfig(
        vision_config={name: getattr(vision, name) for name in fields} | {"attention_bias": True},
        text_config=text,
        image_token_id=config.image_token_index,
        image_seq_length=config.tokens_per_tile,
        downsample_ratio=config.downsample_ratio,
        tie_word_embeddings=config.tie_word_embeddings,
    )
    like.vision_config._attn_implementation = like.text_config._attn_implementation = "sdpa"
    return like


def register_attention() -> str:
    """The name of flash-attn-4 for the decoder's attention. Raises ImportError without it."""
    import flash_attn.cute.interface  # noqa: F401
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(ATTENTION, _attention)
    AttentionMaskInterface.register(ATTENTION, lambda *_, **__: None)
    return ATTENTION


def make(config: Any, *, plain: bool = False) -> Any:
    """The model with the sizes of `config`, on the default device, in the default dtype. plain: without Liger and flash-attn-4 (a CPU).

    Raises ImportError where a package is missing.
    """
    from transformers import InternVLForConditionalGeneration

    like = internvl(config)
    if not plain:
        from liger_kernel.transformers import apply_liger_kernel_to_qwen2

        like.text_config._attn_implementation = register_attention()
        apply_liger_kernel_to_qwen2(rope=True, rms_norm=True, swiglu=True, fused_linear_cross_entropy=False)
    model: Any = InternVLForConditionalGeneration(like).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    return model


def labelled(model: Any, pack: PackedBatch) -> tuple[Tensor, Tensor]:
    """Features and targets of the rows with labels, which are the last ones of a pack of one sequence."""
    assert isinstance(pack.targets, Tensor)
    assert isinstance(pack.tiles, Tensor)
    pixels = torch.empty(len(pack.tiles), 3, *pack.tiles.shape[1:3], dtype=model.dtype, device=pack.tiles.device)
    for part, target in zip(pack.tiles.split(16), pixels.split(16)):
        target.copy_(part.permute(0, 3, 1, 2).float() / 127.5 - 1)
    hidden = model.model(
        input_ids=pack.input_ids[None], pixel_values=pixels, position_ids=pack.position_ids[None], use_cache=False
    ).last_hidden_state[0]
    return hidden[-pack.num_kept :], pack.targets[-pack.num_kept :]


def loss(model: Any, pack: PackedBatch, *, plain: bool = False) -> Tensor:
    """Mean loss of the rows with labels."""
    rows, targets = labelled(model, pack)
    if plain:
        return torch.nn.functional.cross_entropy(model.lm_head(rows).float(), targets)
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    return LigerFusedLinearCrossEntropyLoss()(model.lm_head.weight, rows, targets)


LIGER = Public(NAME, make, loss)


def compare(result: Result, contender: Public, cases: list[tuple[str, int]], rounds: int, layers: int, out: Path | None) -> None:
    """The steps of `policies.measure`, (name, tokens), by public packages; a case that fails does not stop the others."""
    release()
    config = described(layers)
    try:
        model = make_model(config, torch.bfloat16, contender.make)
    except Exception as error:
        result.absent += [Absent(name, contender.name, f"{type(error).__name__}: {error}"[:200]) for name, _ in cases]
        return
    losses: list[float] = []

    def step(pack: PackedBatch) -> None:
        found = contender.loss(model, pack)
        found.backward()
        losses.append(found.item())
        model.zero_grad(set_to_none=True)

    for name, tokens in cases:
        try:
            inputs, times = one_sequence(config, tokens), []
            for _ in range(rounds + 1):
                release()
                torch.cuda.reset_peak_memory_stats()
                times.append(milliseconds(partial(step, inputs)))
                peak = torch.cuda.max_memory_allocated() / GIB
                log(f"{name} {contender.name}: {times[-1]:.0f} ms, loss {losses[-1]:.4f}, peak {peak:.2f} GiB")
            details = {"tokens": inputs.input_ids.numel(), "all_ms": times}
            figures = {"ms": min(times), "tokens_per_s": tokens / min(times) * 1e3, "peak_gib": peak, "loss": losses[-1]}
            result.add(f"{name}, {tokens} tokens", contender.name, details=details, **figures)
        except Exception as error:
            log(f"{name} {contender.name}: {type(error).__name__}: {str(error)[:300]}")
            result.absent.append(Absent(name, contender.name, f"{type(error).__name__}: {error}"[:200]))
            model.zero_grad(set_to_none=True)
        if out is not None:
            write(result, out)
