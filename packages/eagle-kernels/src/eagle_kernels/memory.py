"""What a training step needs, before a GPU is rented: the sum of everything that is alive at the moment of each possible peak.

The step is: vision tower, decoder layers with a checkpoint each, linear cross-entropy, backward. Three moments can be the peak: the
loss (one chunk of logits and the float32 head gradient on top of every checkpoint), the MLP of a layer in backward, and its attention.
Which layer matters too: going down, checkpoints disappear and gradients appear, so the first and the last layer are compared.
"""

from dataclasses import dataclass, field

from eagle_kernels.linear_cross_entropy import chunk_rows

GIB = 1 << 30


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
    """Sizes of the vision tower and of what goes through it in one step: `patches` over all tiles (4 of them become a token).

    frozen: it needs no gradients and keeps no checkpoints.
    """

    width: int
    intermediate: int
    layers: int
    patches: int
    frozen: bool = False

    @property
    def parameters(self) -> int:
        return self.layers * (4 * self.width * self.width + 2 * self.width * self.intermediate)


@dataclass(frozen=True)
class MemoryPlan:
    """Peaks in bytes. `parts`: what is alive at the GPU's peak; `moment`: which moment that is."""

    gpu: int
    host: int
    moment: str
    parts: dict[str, int] = field(default_factory=dict)

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

    weight_bytes, gradient_bytes, optimizer_bytes: per parameter (AdamW in float32 with a float32 master weight: 12).
    gradients_kept: gradients exist before the step (accumulation); else they appear during backward.
    offload: checkpoints wait on the host, but for `gpu_states` layers. keep_attention: attention outputs and LSE are stored with them.
    mlp_rows: `rows` of `swiglu_mlp`. labelled: rows with a label (default: all).
    shards: FSDP ranks over which weights, gradients and optimiser are divided; two whole layers are then in flight.
    Counts what torch allocates, not the CUDA context (0.5 GiB) or libraries' workspaces.
    Raises ValueError for sizes below 1.
    """
    for name, value in (("tokens", tokens), ("shards", shards), ("mlp_rows", 1 if mlp_rows is None else mlp_rows)):
        if value < 1:
            raise ValueError(f"plan_memory: {name} is {value}, expected 1 or more")
    labelled = tokens if labelled is None else labelled
    if not 0 <= labelled <= tokens:
        raise ValueError(f"plan_memory: labelled is {labelled}, expected 0 to {tokens}, the tokens")
    act, heads, layers = activation_bytes, decoder.heads * decoder.head_dim, decoder.layers
    qkv = (decoder.heads + 2 * decoder.kv_heads) * decoder.head_dim
    state = tokens * decoder.hidden * act
    lse = 4 * tokens * decoder.heads
    kept = state + (tokens * heads * act + lse if keep_attention else 0)

    vision_parameters = vision.parameters if vision is not None else 0
    total = decoder.parameters + vision_parameters
    trained = total - (vision_parameters if vision is not None and vision.frozen else 0)
    layer, head = decoder.layer_parameters, decoder.vocab * decoder.hidden
    in_flight = 2 * layer * weight_bytes + layer * gradient_bytes if shards > 1 else 0
    static = {"weights": total * weight_bytes // shards, "optimizer": trained * optimizer_bytes // shards, "layers in flight": in_flight}
    all_gradients = trained * gradient_bytes // shards

    # Checkpoints: on the host but for the current one and the one beside it; the engine's own share on the GPU comes first.
    on_gpu = min(gpu_states, layers) if offload else layers
    host = (layers - 1 - min(gpu_states, layers - 1)) * kept if offload else 0

    def checkpoints(below: int) -> int:
        return (min(on_gpu, below) + (min(2, below - min(on_gpu, below)) if offload else 0)) * kept

    vision_state = vision.patches * vision.width * act if vision is not None and not vision.frozen else 0
    vision_kept = vision_state * (vision.layers if vision is not None else 0)

    # The moment of the loss: final states, their norm, its gradient, one chunk of logits, the head's gradient in float32.
    chunk = min(labelled, chunk_rows(decoder.vocab, act)) * decoder.vocab * act
    loss = static | {
        "gradients": all_gradients if gradients_kept else 0,
        "checkpoints": checkpoints(layers) + vision_kept,
        "final states": 3 * state,
        "logits": chunk + (0 if labelled == tokens else min(labelled, chunk_rows(decoder.vocab, act)) * decoder.hidden * act * 2),
        "head gradient in float32": 4 * head if labelled else 0,
    }
    handover = loss | {
        "gradients": all_gradients if gradients_kept else 0,
        "logits": 0,
        "head gradient in the weight's dtype": head * gradient_bytes if gradient_bytes != 4 else 0,
    }

    # A layer in backward: its input, both norms' outputs, q, k, v, attention output, LSE and the residual are rebuilt and kept.
    rebuilt = 3 * state + tokens * (qkv + heads) * act + lse
    rows = tokens if mlp_rows is None else min(tokens, mlp_rows)
    block = rows * decoder.intermediate * act
    weights_of_mlp = 3 * decoder.hidden * decoder.intermediate
    whole = mlp_rows is None or mlp_rows >= tokens
    # Six of [rows, I]: gate, up, their gradients, the activation and its gradient (which is gone when the weight gradients are made).
    mlp = max(6 * block, 5 * block + weights_of_mlp * gradient_bytes) if whole else 6 * block + weights_of_mlp * (4 + gradient_bytes)
    mlp += 2 * state
    attention = 3 * state + tokens * (qkv + 2 * heads) * act + 4 * tokens * heads

    def gradients_at(index: int) -> int:
        made = head + decoder.hidden + (layers - 1 - index) * layer
        return all_gradients if gradients_kept else made * gradient_bytes // shards

    moments = {"the loss": loss, "the head's backward": handover}
    for index in {0, layers - 1}:
        for name, live in (("MLP", mlp), ("attention", attention)):
            moments[f"backward of layer {index}, {name}"] = static | {
                "gradients": gradients_at(index)
                + (0 if gradients_kept else layer * gradient_bytes // shards if name == "attention" else 0),
                "checkpoints": checkpoints(index + 1) + vision_kept,
                "rebuilt layer": rebuilt,
                "live": live,
            }
    moments["the embedding's backward"] = static | {
        "gradients": all_gradients if gradients_kept else (trained - vision_parameters) * gradient_bytes // shards,
        "checkpoints": vision_kept,
        "live": 2 * state + (head * gradient_bytes if gradients_kept or decoder.tied else 0),
    }
    if vision is not None and not vision.frozen:
        inner = vision.patches * vision.intermediate * act
        moments["the vision tower's backward"] = static | {
            "gradients": all_gradients,
            "checkpoints": vision_kept,
            "live": 10 * vision_state + 3 * inner,
        }
    moment = max(moments, key=lambda name: sum(moments[name].values()))
    return MemoryPlan(gpu=sum(moments[moment].values()), host=host, moment=moment, parts=moments[moment])
