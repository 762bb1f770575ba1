"""What a training step needs, before a GPU is rented: the sum of everything that is alive at the moment of each possible peak.

The step is: vision tower, connector, decoder layers with a checkpoint each, linear cross-entropy, backward, optimiser. The peak may be the
loss (one chunk of logits and the float32 head gradient on top of every checkpoint), the MLP or the attention of a decoder layer in
backward, a layer of the tower, or FSDP's reduction of what is in no layer. Which layer matters too: going down, checkpoints disappear and
gradients appear, so the first and the last layer are compared.
"""

from dataclasses import asdict, dataclass, field

from eagle_kernels.linear_cross_entropy import chunk_rows

GIB = 1 << 30
MAY_BE_ZERO = ("gradient_bytes", "optimizer_bytes", "gpu_states", "vision.patches")


@dataclass(frozen=True)
class DecoderShape:
    """Sizes of a Llama- or Qwen-like decoder; `tied` heads share the embedding's weight."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool = False

    @property
    def layer_parameters(self) -> int:
        attention = self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads) + self.head_dim * (self.heads + 2 * self.kv_heads)
        return attention + 3 * self.hidden * self.intermediate + 2 * self.hidden

    @property
    def parameters(self) -> int:
        return self.layers * self.layer_parameters + self.vocab * self.hidden * (1 if self.tied else 2) + self.hidden


@dataclass(frozen=True)
class VisionShape:
    """Sizes of a SigLIP-like tower and of what goes through it in one step: `patches` over all tiles; `merge` of them become a token, which
    LayerNorm, Linear, GELU, Linear bring to the decoder's width. `positions`: patches of a tile; `patch_values`: numbers in a patch.

    frozen: the tower needs no gradients and keeps no checkpoints (the connector still learns).
    """

    width: int
    intermediate: int
    layers: int
    patches: int
    frozen: bool = False
    merge: int = 4
    positions: int = 1024
    patch_values: int = 588

    @property
    def layer_parameters(self) -> int:
        w, inner = self.width, self.intermediate
        return 4 * (w * w + w) + 2 * w * inner + inner + w + 4 * w

    @property
    def parameters(self) -> int:
        return self.layers * self.layer_parameters + self.width * (self.patch_values + 1 + self.positions + 2)

    def connector_parameters(self, hidden: int) -> int:
        wide = self.merge * self.width
        return 2 * wide + wide * hidden + hidden * hidden + 2 * hidden

    def kept(self, hidden: int, itemsize: int) -> dict[str, int]:
        """Bytes that forward leaves for backward: tower's checkpoints, connector's activations, pixels."""
        tower = 0 if self.frozen else self.patches * self.width
        # The input of the post-layernorm, then of the connector's LayerNorm, of both Linears and of GELU; what comes out is kept by the
        # operator that puts it among the embeddings.
        connector = tower + 2 * self.patches * self.width + 3 * (self.patches // self.merge) * hidden
        pixels = self.patches * self.patch_values * (1 if self.frozen else 1 + itemsize)
        return {"vision checkpoints": self.layers * tower * itemsize, "connector": connector * itemsize, "pixels": pixels}


@dataclass(frozen=True)
class MemoryPlan:
    """Peaks in bytes. `parts`: what is alive at the GPU's peak; `moment`: which moment that is; `moments`: the same of all moments."""

    gpu: int
    host: int
    moment: str
    parts: dict[str, int] = field(default_factory=dict)
    moments: dict[str, dict[str, int]] = field(default_factory=dict, repr=False)

    def __str__(self) -> str:
        lines = [f"GPU {self.gpu / GIB:.2f} GiB (peak in {self.moment}), host {self.host / GIB:.2f} GiB"]
        return "\n".join(lines + [f"  {name}: {size / GIB:.2f} GiB" for name, size in self.parts.items() if size])


def plan_memory(
    decoder: DecoderShape,
    tokens: int,
    *,
    vision: VisionShape | None = None,
    weight_bytes: int = 2,
    gradient_bytes: int = 2,
    optimizer_bytes: int = 0,
    compute_bytes: int | None = None,
    activation_bytes: int = 2,
    gradients_kept: bool = False,
    offload: bool = False,
    gpu_states: int = 0,
    keep_attention: bool = False,
    mlp_rows: int | None = None,
    labelled: int | None = None,
    shards: int = 1,
) -> MemoryPlan:
    """Peak GPU and host memory of forward + backward over `tokens` tokens (of one rank), every layer checkpointed.

    weight_bytes, gradient_bytes, optimizer_bytes: per parameter at rest (AdamW in float32: weights 4, gradients 4, optimizer 8; with
    weights in bf16 and their float32 master among the states: 2, 2 or 4, 12).
    compute_bytes: FSDP2 computes with copies of this width, a unit (a layer, or all the rest) at a time; None: it doesn't, and weights are
    used where they are (with shards > 1: copies of weight_bytes).
    gradients_kept: gradients exist before the step (accumulation); else they appear during backward.
    offload: checkpoints of the decoder wait on the host, but for `gpu_states` layers. keep_attention: attention outputs and LSE are stored
    with them. mlp_rows: `rows` of `swiglu_mlp`. labelled: rows with a label (default: all).
    shards: FSDP ranks over which weights, gradients and optimiser are divided.
    Counts what torch allocates, not the CUDA context (0.5 GiB) or libraries' workspaces.
    Raises ValueError for sizes below 1; those of which a step may have none (patches, bytes of an optimiser or a gradient, labels,
    gpu_states) may be 0.
    """
    sizes = {"tokens": tokens, "shards": shards, "mlp_rows": mlp_rows, "weight_bytes": weight_bytes, "compute_bytes": compute_bytes}
    sizes |= {"activation_bytes": activation_bytes, "gradient_bytes": gradient_bytes, "optimizer_bytes": optimizer_bytes}
    sizes |= {"gpu_states": gpu_states} | {f"decoder.{name}": size for name, size in asdict(decoder).items() if name != "tied"}
    sizes |= {f"vision.{name}": size for name, size in (asdict(vision) if vision else {}).items() if name != "frozen"}
    for name, size in sizes.items():
        least = 0 if name in MAY_BE_ZERO else 1
        if size is not None and size < least:
            raise ValueError(f"plan_memory: {name} is {size}, expected {least} or more")
    labelled = tokens if labelled is None else labelled
    if not 0 <= labelled <= tokens:
        raise ValueError(f"plan_memory: labelled is {labelled}, expected 0 to {tokens}, the tokens")
    act, heads, layers = activation_bytes, decoder.heads * decoder.head_dim, decoder.layers
    qkv = (decoder.heads + 2 * decoder.kv_heads) * decoder.head_dim
    state = tokens * decoder.hidden * act
    lse = 4 * tokens * decoder.heads
    kept = state + (tokens * heads * act + lse if keep_attention else 0)

    layer, head = decoder.layer_parameters, decoder.vocab * decoder.hidden
    tower = vision.parameters if vision is not None else 0
    total = decoder.parameters + tower + (vision.connector_parameters(decoder.hidden) if vision is not None else 0)
    trained = total - (tower if vision is not None and vision.frozen else 0)
    # The unit of FSDP that is neither a decoder layer nor a layer of the tower: it stays whole from the first forward to the last backward.
    root = total - layers * layer - (vision.layers * vision.layer_parameters if vision is not None else 0)
    copies = compute_bytes if compute_bytes is not None else weight_bytes if shards > 1 else 0
    # Gradients of a unit, until they are reduced, have the dtype of its copies; where there are none they are at rest at once.
    loose_bytes = copies or gradient_bytes

    def at_rest(parameters: int) -> int:
        return parameters * gradient_bytes // shards

    static = {
        "weights": total * weight_bytes // shards,
        "optimizer": trained * optimizer_bytes // shards,
        # The layer that computes and the next one; over several ranks also the buffer in which the next one arrives.
        "whole weights": copies * (root + (2 if shards == 1 else 3) * layer),
    }
    # The reduction's input, in float32, of the layer whose backward is over is freed at the end of the next one.
    reduction = {"gradients in reduction": layer * gradient_bytes if copies else 0}
    pictures = vision.kept(decoder.hidden, act) if vision is not None else {}

    # Checkpoints: on the host but for the current one and the one beside it; the engine's own share on the GPU comes first.
    on_gpu = min(gpu_states, layers) if offload else layers
    host = (layers - 1 - min(gpu_states, layers - 1)) * kept if offload else 0

    def checkpoints(below: int) -> int:
        return (min(on_gpu, below) + (min(2, below - min(on_gpu, below)) if offload else 0)) * kept

    # The moment of the loss: final states, their norm, its gradient, one chunk of logits, the head's gradient in float32.
    chunk = chunk_rows(labelled, decoder.vocab, act)
    loss = static | {
        "gradients": at_rest(trained) if gradients_kept else 0,
        "checkpoints": checkpoints(layers),
        **pictures,
        "final states": 3 * state,
        "logits": chunk * decoder.vocab * act + (0 if labelled == tokens else chunk * decoder.hidden * act * 2),
        "head gradient in float32": 4 * head if labelled else 0,
    }
    handover = loss | {"logits": 0, "head gradient in the weight's dtype": head * loose_bytes if loose_bytes != 4 else 0}

    # A layer in backward: its input, both norms' outputs, q, k, v, attention output, LSE and the residual are rebuilt and kept.
    rebuilt = 3 * state + tokens * (qkv + heads) * act + lse
    rows = tokens if mlp_rows is None else min(tokens, mlp_rows)
    block = rows * decoder.intermediate * act
    weights_of_mlp = 3 * decoder.hidden * decoder.intermediate
    whole = mlp_rows is None or mlp_rows >= tokens
    # Six of [rows, I]: gate, up, their gradients, the activation and its gradient (which is gone when the weight gradients are made).
    mlp = max(6 * block, 5 * block + weights_of_mlp * loose_bytes) if whole else 6 * block + weights_of_mlp * (4 + loose_bytes)
    mlp += 2 * state
    attention = 3 * state + tokens * (qkv + 2 * heads) * act + 4 * tokens * heads

    def gradients_below(index: int) -> dict[str, int]:
        """Those of the layers that are done, and of the head and the final norm, which with FSDP wait for the rest of their unit."""
        done = (layers - 1 - index) * layer
        if gradients_kept:
            return {"gradients": at_rest(trained), "gradients of the rest": (head + decoder.hidden) * copies}
        if copies:
            return {"gradients": at_rest(done), "gradients of the rest": (head + decoder.hidden) * copies}
        return {"gradients": at_rest(done + head + decoder.hidden)}

    moments = {"the loss": loss, "the head's backward": handover}
    for index in {0, layers - 1}:
        for name, live in (("MLP", mlp), ("attention", attention)):
            made = layer * loose_bytes if name == "attention" and (copies or not gradients_kept) else 0
            moments[f"backward of layer {index}, {name}"] = (
                static
                | (reduction if index < layers - 1 else {})
                | gradients_below(index)
                | {
                    "gradients of the layer": made,
                    "checkpoints": checkpoints(index + 1),
                    **pictures,
                    "rebuilt layer": rebuilt,
                    "live": live,
                }
            )
    moments["the embedding's backward"] = (
        static
        | reduction
        | gradients_below(-1)
        | {**pictures, "live": 2 * state + (head * loose_bytes if not decoder.tied or gradients_kept or copies else 0)}
    )
    if vision is not None and not vision.frozen:
        picture, inner = vision.patches * vision.width * act, vision.patches * vision.intermediate * act
        done = gradients_below(-1)
        done["gradients"] = max(done["gradients"], at_rest(trained - (root if copies else 0)))
        if copies:
            done["gradients of the rest"] = root * copies
        # Rebuilt: both norms' outputs, q, k, v, attention output, residual; then the gradient and the residual's.
        moments["the vision tower's backward"] = (
            static | done | {name: size for name, size in pictures.items() if name != "connector"} | {"live": 9 * picture + 3 * inner}
        )
    if copies:
        # At the end the rest is reduced: from the copies' dtype to a whole input and a sharded output of the gradients' dtype.
        moments["the last reduction"] = {
            "weights": static["weights"],
            "optimizer": static["optimizer"],
            "gradients": at_rest(trained) if gradients_kept else at_rest(trained - root),
            "gradients in reduction": root * (gradient_bytes + max(copies, gradient_bytes // shards)),
        }
    if not gradients_kept:
        moments["the optimizer's step"] = {
            "weights": static["weights"],
            "optimizer": static["optimizer"],
            "gradients": at_rest(trained),
        }
    moment = max(moments, key=lambda name: sum(moments[name].values()))
    return MemoryPlan(gpu=sum(moments[moment].values()), host=host, moment=moment, parts=moments[moment], moments=moments)
