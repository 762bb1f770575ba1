"""Peak memory of a training step, computed before it runs: the sum of everything that is alive at each moment that can be the peak.

The step is: vision tower, connector, decoder layers with activation checkpointing, linear cross-entropy, backward, optimizer. The peak can
be the loss (one chunk of logits and the float32 head gradient, in addition to the stored input of every layer), the MLP or the attention
of a decoder layer in backward, a layer of the vision tower, or FSDP's reduction of the parameters outside of layers. During backward stored
inputs are released and gradients are allocated, so both the first and the last decoder layer are evaluated.
"""

from dataclasses import dataclass, field, fields
from typing import Any

from eagle_kernels.memory.float8 import linears_backward, mlp_backward
from eagle_kernels.memory.kept import ATTENTION, MLP, NOTHING, PROJECTIONS, Kept
from eagle_kernels.memory.shapes import DecoderShape, Training, VisionShape
from eagle_kernels.ops.linear_cross_entropy import chunk_rows

GIB = 1 << 30
MAY_BE_ZERO = (
    *("decoder.vectors", "gradient_bytes", "optimizer_bytes", "kept_bytes", "gpu_states", "vision.patches"),
    *("decoder.training.rank", "vision.training.rank", "vision.connector.rank"),
)


@dataclass(frozen=True)
class MemoryPlan:
    """Peak sizes in bytes.

    gpu, host: the peaks; moment: the moment of the GPU's peak; parts: what is alive at that moment; moments: the parts of every moment.
    """

    gpu: int
    host: int
    moment: str
    parts: dict[str, int] = field(default_factory=dict)
    moments: dict[str, dict[str, int]] = field(default_factory=dict, repr=False)

    def __str__(self) -> str:
        lines = [f"GPU {self.gpu / GIB:.2f} GiB (peak in {self.moment}), host {self.host / GIB:.2f} GiB"]
        return "\n".join(lines + [f"  {name}: {size / GIB:.2f} GiB" for name, size in self.parts.items() if size])


def _check(decoder: DecoderShape, vision: VisionShape | None, tokens: int, labelled: int, **given: float | None) -> None:
    sizes: dict[str, float | None] = {"tokens": tokens} | given | {f"decoder.{name}": size for name, size in _sizes(decoder)}
    sizes |= {f"vision.{name}": size for name, size in (_sizes(vision) if vision else ())}
    for name, size in sizes.items():
        least = 0 if name in MAY_BE_ZERO else 1
        if size is None:
            continue
        if not least <= size < float("inf"):
            raise ValueError(f"plan_memory: {name} is {size}, expected {least} or more")
        if name != "optimizer_bytes" and size % 1:  # the only mean
            raise ValueError(f"plan_memory: {name} is {size}, expected a whole number")
    if decoder.heads % decoder.kv_heads:
        raise ValueError(
            f"plan_memory: decoder.heads is {decoder.heads}, expected a multiple of decoder.kv_heads, which is {decoder.kv_heads}"
        )
    if not 0 <= labelled <= tokens or labelled % 1:
        raise ValueError(f"plan_memory: labelled is {labelled}, expected a whole number from 0 to {tokens}, the number of tokens")


def _sizes(shape: Any) -> list[tuple[str, int]]:
    """The fields of a shape that are numbers of elements."""
    values = [(field.name, value) for field in fields(shape) if (value := getattr(shape, field.name)) is not None]
    ranks = [(f"{name}.rank", value.rank) for name, value in values if isinstance(value, Training)]
    return ranks + [(name, value) for name, value in values if not isinstance(value, bool | Training)]


def plan_memory(
    decoder: DecoderShape,
    tokens: int,
    *,
    vision: VisionShape | None = None,
    weight_bytes: int = 2,
    gradient_bytes: int = 2,
    optimizer_bytes: float = 0,
    kept_bytes: int = 0,
    compute_bytes: int | None = None,
    reduction_bytes: int | None = None,
    activation_bytes: int = 2,
    gradients_kept: bool = False,
    offload: bool = False,
    gpu_states: int = 0,
    keep_attention: bool = False,
    mlp_rows: int | None = None,
    labelled: int | None = None,
    shards: int = 1,
    kept: Kept | None = None,
    vision_kept: Kept | None = None,
    vision_group: int | None = None,
    exchanged: bool = False,
) -> MemoryPlan:
    """Peak GPU and host memory of forward, backward and optimizer step over `tokens` tokens on one rank, with activation checkpointing.

    decoder.training, vision.training, vision.connector: which parameters are trained, have adapters, and are in 4 bits; and which linear
    layers multiply 8-bit floats, whose copies exist during their products.
    weight_bytes: per parameter that is not in 4 bits. gradient_bytes, optimizer_bytes: per trained parameter, the
    latter a mean where kinds of parameters have different states. All outside of computation
    (AdamW in float32: weights 4, gradients 4, optimizer 8; bf16 weights with a float32 copy among the optimizer's states: 2, 2 or 4, 12).
    kept_bytes: of something else that is there throughout, on each rank (a moving average of the weights).
    compute_bytes: per parameter of the copies that FSDP2 computes with, one unit (a layer, or all parameters outside of layers) at a time.
    None: computation uses the weights themselves, or with shards > 1 copies of weight_bytes.
    reduction_bytes: per element of a gradient while FSDP2 sums it over the ranks (default: gradient_bytes).
    activation_bytes: per element of an activation.
    gradients_kept: gradients exist before the step (accumulation); otherwise backward allocates them.
    offload: the stored inputs of decoder layers are in host memory, except those of `gpu_states` layers. keep_attention: attention outputs
    and LSE are stored too. mlp_rows: `rows` of `swiglu_mlp`, in layers that do not keep gate and up; without effect where
    `decoder.mlp_in_blocks` is false. labelled: number of rows with a label (default: all).
    shards: number of FSDP ranks over which weights, gradients and optimizer states are divided.
    kept, vision_kept: what decoder layers and those of the tower keep in addition to their inputs (default: nothing); not with offload,
    except for a group of tiles. vision_group: backward runs tower and connector again for so many tiles at a time, of which the tower
    keeps vision_kept. exchanged: attention runs through Ulysses, which keeps more.

    Counts what torch allocates, without the CUDA context (0.5 GiB) and libraries' workspaces. Measured accuracy: see the README.
    Raises ValueError for sizes below 1 or, except optimizer_bytes, not whole. gradient_bytes, optimizer_bytes, kept_bytes, labelled,
    gpu_states, ranks of adapters and the number of patches can be 0. gpu_states may be more than there are layers.
    """
    labelled = tokens if labelled is None else labelled
    _check(
        decoder, vision, tokens, labelled, shards=shards, mlp_rows=mlp_rows, weight_bytes=weight_bytes, compute_bytes=compute_bytes,
        reduction_bytes=reduction_bytes, activation_bytes=activation_bytes, gradient_bytes=gradient_bytes, optimizer_bytes=optimizer_bytes,
        gpu_states=gpu_states, kept_bytes=kept_bytes, vision_group=vision_group,
    )  # fmt: skip
    act, heads, layers = activation_bytes, decoder.heads * decoder.head_dim, decoder.layers
    kept, vision_kept = kept or Kept(), vision_kept or Kept()
    if offload and (kept.attention or (vision_kept.attention and vision_group is None)):
        raise ValueError("plan_memory: kept activations and offload do not go together; use gpu_states and keep_attention")
    qkv = (decoder.heads + 2 * decoder.kv_heads) * decoder.head_dim
    state = tokens * decoder.hidden * act
    lse = 4 * tokens * decoder.heads
    levels = [kept.level(index, layers) for index in range(layers)]
    stored = [decoder.kept(max(level, ATTENTION if keep_attention else NOTHING), tokens, act, exchanged=exchanged) for level in levels]

    layer, head = decoder.layer, decoder.vocab * decoder.hidden
    learned_head = head if decoder.rest.trained else 0
    total, root = decoder.total, decoder.rest
    if vision is not None:
        connector = vision.connector_total(decoder.hidden)
        total, root = total + vision.total + connector, root + vision.rest + connector
    copies = compute_bytes if compute_bytes is not None else weight_bytes if shards > 1 else 0
    # Until they are reduced or added up, the gradients of a unit have the dtype that it computes in. Without copies nothing is reduced.
    loose_bytes = copies or min(weight_bytes, gradient_bytes)
    reduction_bytes = gradient_bytes if reduction_bytes is None else reduction_bytes

    def at_rest(parameters: int) -> int:
        return parameters * gradient_bytes // shards

    # `root`, the parameters outside of layers, is one unit of FSDP. It is gathered from the first forward to the last backward.
    always = {
        # FSDP does not shard what is in 4 bits.
        "weights": total.plain * weight_bytes // shards + total.quantized_bytes,
        "optimizer": round(total.trained * optimizer_bytes) // shards,
        "kept": kept_bytes,
    }
    static = always | {
        # The current layer and the next one; with several ranks also the buffer that receives the next one.
        "whole weights": copies * (root.plain + (2 if shards == 1 else 3) * layer.plain),
    }
    # The reduction's input of a layer is freed at the end of the next layer's backward.
    reduction = {"gradients in reduction": layer.trained * reduction_bytes if copies else 0}
    images = vision.kept(decoder.hidden, act, vision_kept, grouped=vision_group is not None) if vision is not None else {}

    # Stored inputs are on the host, except those of the current layer, of its neighbour, and of the first `gpu_states` layers.
    on_gpu = min(gpu_states, layers) if offload else layers
    host = (layers - 1 - min(gpu_states, layers - 1)) * stored[0] if offload else 0

    def checkpoints(below: int) -> int:
        if offload:
            return (min(on_gpu, below) + min(2, below - min(on_gpu, below))) * stored[0]
        return sum(stored[:below])

    # The loss: final states, their norm and its gradient, one chunk of logits, the head's gradient in float32.
    chunk = chunk_rows(labelled, decoder.vocab, act)
    loss = static | {
        "gradients": at_rest(total.trained) if gradients_kept else 0,
        "checkpoints": checkpoints(layers),
        **images,
        "final states": 3 * state,
        "logits": chunk * decoder.vocab * act + (0 if labelled == tokens else chunk * decoder.hidden * act * 2),
        "head gradient in float32": 4 * learned_head if labelled else 0,
    }
    handover = loss | {"logits": 0, "head gradient in the weight's dtype": learned_head * loose_bytes if loose_bytes != 4 else 0}

    # Backward of a layer rebuilds what it does not keep. Its MLP needs the second norm's output and the residual; if attention is rebuilt
    # for that, also all before it: the first norm's output, q, k, v, attention output and LSE. Its attention needs the latter.
    before_mlp = state + tokens * (qkv + heads) * act + lse

    def rebuilt(level: int, name: str) -> int:
        if level == NOTHING:
            return before_mlp + (2 * state if name == "MLP" else 0)
        if name == "MLP":
            return 2 * state
        return state + tokens * qkv * act if level < PROJECTIONS else tokens * (heads + decoder.kv_heads * decoder.head_dim) * act

    mlp_rows = mlp_rows if decoder.mlp_in_blocks else None
    rows = tokens if mlp_rows is None else min(tokens, mlp_rows)
    block = rows * decoder.intermediate * act
    weights_of_mlp = 3 * decoder.hidden * decoder.intermediate if decoder.training.mode == "full" else 0
    whole = mlp_rows is None or mlp_rows >= tokens
    # Six of [rows, I]: gate, up, their gradients, the activation and its gradient (freed before the weight gradients are computed).
    mlp = max(6 * block, 5 * block + weights_of_mlp * loose_bytes) if whole else 6 * block + weights_of_mlp * (4 + loose_bytes)
    mlp += 2 * state
    # Gate and up are not rebuilt where they are kept, and all tokens are worked on at once.
    wide = tokens * decoder.intermediate * act
    mlp_kept = max(4 * wide, 3 * wide + weights_of_mlp * loose_bytes) + 2 * state
    attention = 3 * state + tokens * (qkv + 2 * heads) * act + 4 * tokens * heads
    if decoder.training.quantized:
        # One weight at a time is computed from its codes.
        mlp, mlp_kept = (live + decoder.hidden * decoder.intermediate * act for live in (mlp, mlp_kept))
        attention += decoder.hidden * heads * act
    if decoder.training.float8:
        sizes = (tokens, decoder.hidden, decoder.intermediate, act, weights_of_mlp * loose_bytes)
        mlp, mlp_kept = (2 * state + mlp_backward(*sizes, rebuilt=again) for again in (True, False))
        attention += max(linears_backward(tokens, *shape, act) for shape in ((decoder.hidden, qkv), (heads, decoder.hidden)))
    # Gradients of the head and the final norm, which FSDP reduces with the rest of their unit.
    last = head + decoder.hidden if learned_head else 0

    def gradients_below(index: int) -> dict[str, int]:
        """Gradients of the layers above `index`, of the head and of the final norm."""
        done = (layers - 1 - index) * layer.trained
        if gradients_kept:
            return {"gradients": at_rest(total.trained), "gradients of the rest": last * copies}
        if copies:
            return {"gradients": at_rest(done), "gradients of the rest": last * copies}
        return {"gradients": at_rest(done + last)}

    moments = {"the loss": loss, "the head's backward": handover}
    for index in sorted(kept.borders(layers)):
        level = levels[index]
        for name, live in (("MLP", mlp_kept if level == MLP else mlp), ("attention", attention)):
            made = layer.trained * loose_bytes if name == "attention" and (copies or not gradients_kept) else 0
            moments[f"backward of layer {index}, {name}"] = (
                static
                | (reduction if index < layers - 1 else {})
                | gradients_below(index)
                | {
                    "gradients of the layer": made,
                    "checkpoints": checkpoints(index + 1),
                    **images,
                    "rebuilt layer": rebuilt(level, name),
                    "live": live,
                }
            )
    moments["the embedding's backward"] = (
        static
        | reduction
        | gradients_below(-1)
        | {**images, "live": 2 * state + (learned_head * loose_bytes if not decoder.tied or gradients_kept or copies else 0)}
    )
    if vision is not None and vision.learns:
        at_once = vision.group(vision_group)
        patch_states, inner = at_once.patches * vision.width * act, at_once.patches * vision.intermediate * act
        done = gradients_below(-1)
        done["gradients"] = max(done["gradients"], at_rest(total.trained - (root.trained if copies else 0)))
        if copies:
            done["gradients of the rest"] = root.trained * copies
        # Recomputed: both norms' outputs, q, k, v, attention output, residual; then the gradient and the residual's gradient. Where
        # attention is kept, the MLP is done before q, k, v are computed.
        level = vision_kept.level(vision.depth - 1, vision.depth)
        again: dict[str, int] = {}
        if vision_group is not None:  # what the group keeps, and the gradient of the visual tokens of all tiles
            again["a group of tiles"] = sum(at_once.kept(decoder.hidden, act, vision_kept).values())
            again["gradient of the visual tokens"] = (vision.patches // vision.merge) * decoder.hidden * act
        live = 9 * patch_states + 3 * inner
        if level >= ATTENTION:
            live = max(9 * patch_states, 4 * patch_states + (2 if level == MLP else 3) * inner)
        if vision.training.float8:
            live += linears_backward(at_once.patches, vision.width, vision.intermediate, act)
        moments["the vision tower's backward"] = (
            static | done | {name: size for name, size in images.items() if name != "connector"} | again | {"live": live}
        )
    if copies:
        # The last unit is reduced from the copies' dtype to a whole input and a sharded output of the reduction's dtype.
        moments["the last reduction"] = always | {
            "gradients": at_rest(total.trained) if gradients_kept else at_rest(total.trained - root.trained),
            "gradients in reduction": root.trained * (reduction_bytes + max(copies, reduction_bytes // shards)),
        }
    if not gradients_kept:
        moments["the optimizer's step"] = always | {"gradients": at_rest(total.trained)}
    moment = max(moments, key=lambda name: sum(moments[name].values()))
    return MemoryPlan(gpu=sum(moments[moment].values()), host=host, moment=moment, parts=moments[moment], moments=moments)
