"""Sizes of the model's parts that `plan_memory` needs, and how each part is trained."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import ceil
from typing import Literal

from eagle_kernels.memory.kept import ATTENTION, MLP, PROJECTIONS, Kept

Linears = Mapping[str, tuple[int, int]]
"""Linear layers by the end of their name: (in_features, out_features)."""


@dataclass(frozen=True)
class Training:
    """How a part is trained and kept.

    mode: `full` trains all parameters of the part and not its adapters, `lora` its adapters alone, `frozen` nothing.
    rank: of adapters on its linear layers (`W x + B A x`, arXiv 2106.09685), 0: it has none. targets: last names of the layers that have
    one, or ends of their names; None: all. quantized: whether the weights of its linear layers are NF4 with double quantisation (blocks
    of 64 and 256, arXiv 2305.14314). float8: whether its linear layers multiply 8-bit floats (`eagle_kernels.ops.float8`).
    """

    mode: Literal["full", "lora", "frozen"] = "full"
    rank: int = 0
    targets: tuple[str, ...] | None = None
    quantized: bool = False
    float8: bool = False

    def __post_init__(self) -> None:
        if self.mode not in ("full", "lora", "frozen"):
            raise ValueError(f"Training: mode is {self.mode!r}, expected 'full', 'lora' or 'frozen'")

    def adapts(self, name: str) -> bool:
        """Whether the linear layer of this name has an adapter."""
        return self.rank > 0 and (self.targets is None or any(_ends(name, end) for end in self.targets))

    def of(self, parameters: int, linears: Linears) -> "Parameters":
        """Parameters of a module with `parameters` of its own, those of its `linears` included."""
        adapters = self.rank * sum(sum(sizes) for name, sizes in linears.items() if self.adapts(name))
        kept = [wide * narrow for wide, narrow in linears.values()] if self.quantized else []
        return Parameters(
            plain=parameters - sum(kept) + adapters,
            trained={"full": parameters, "lora": adapters, "frozen": 0}[self.mode],
            quantized_bytes=sum(map(nf4_bytes, kept)),
        )


@dataclass(frozen=True)
class Parameters:
    """Numbers of parameters. plain: those kept in the dtype of weights, adapters included. trained: those with gradients and optimizer
    states. quantized_bytes: bytes of the others, which are in 4 bits, on every rank."""

    plain: int = 0
    trained: int = 0
    quantized_bytes: int = 0

    def __add__(self, other: "Parameters") -> "Parameters":
        return Parameters(self.plain + other.plain, self.trained + other.trained, self.quantized_bytes + other.quantized_bytes)

    def __mul__(self, number: int) -> "Parameters":
        return Parameters(self.plain * number, self.trained * number, self.quantized_bytes * number)


def nf4_bytes(elements: int) -> int:
    """Bytes of a weight in NF4: codes, an 8-bit scale for 64 of them, a float32 scale for 256 of those, and a float32 offset."""
    blocks = ceil(elements / 64)
    return ceil(elements / 2) + blocks + 4 * ceil(blocks / 256) + 4


def _ends(name: str, end: str) -> bool:
    return f".{name}".endswith(f".{end}")


class _Stack:
    """Layers of one kind and the parameters around them, by how the part is trained."""

    layers: int
    training: Training

    @property
    def linears(self) -> Linears:
        raise NotImplementedError

    @property
    def layer_parameters(self) -> int:
        raise NotImplementedError

    @property
    def parameters(self) -> int:
        raise NotImplementedError

    @property
    def layer(self) -> Parameters:
        """One layer."""
        return self.training.of(self.layer_parameters, self.linears)

    @property
    def rest(self) -> Parameters:
        """Parameters outside of layers (embeddings, head, last norm), which have no adapters and keep their precision."""
        return self.training.of(self.parameters - self.layers * self.layer_parameters, {})

    @property
    def total(self) -> Parameters:
        """The whole part."""
        return self.layer * self.layers + self.rest


@dataclass(frozen=True)
class DecoderShape(_Stack):
    """Sizes of a decoder like Llama or Qwen. tied: the head shares the embedding's weight.

    vectors: elements of the biases and QK-norms of a layer; None: biases of q, k and v, as in Qwen2. mlp_bias: whether the linear layers
    of the MLP have biases. training: how the decoder is trained.
    """

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool = False
    vectors: int | None = None
    mlp_bias: bool = False
    training: Training = Training()

    @property
    def linears(self) -> Linears:
        """Linear layers of one decoder layer."""
        heads, kv_heads = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "self_attn.q_proj": (self.hidden, heads),
            "self_attn.k_proj": (self.hidden, kv_heads),
            "self_attn.v_proj": (self.hidden, kv_heads),
            "self_attn.o_proj": (heads, self.hidden),
            "mlp.gate_proj": (self.hidden, self.intermediate),
            "mlp.up_proj": (self.hidden, self.intermediate),
            "mlp.down_proj": (self.intermediate, self.hidden),
        }

    @property
    def layer_parameters(self) -> int:
        """Parameters of one decoder layer."""
        biases = self.head_dim * (self.heads + 2 * self.kv_heads)
        linears = sum(inputs * outputs for inputs, outputs in self.linears.values())
        return linears + (biases if self.vectors is None else self.vectors) + 2 * self.hidden

    @property
    def mlp_in_blocks(self) -> bool:
        """Whether the MLP is one `swiglu_mlp`, which can work on some rows at a time: without biases, adapters and weights in 4 bits."""
        adapters = any(self.training.adapts(name) for name in self.linears if name.startswith("mlp."))
        return not (self.mlp_bias or self.training.quantized or adapters)

    def kept(self, level: int, tokens: int, itemsize: int, *, exchanged: bool = False) -> int:
        """Bytes that one layer stores for backward at a level of `eagle_kernels.memory.kept`.

        exchanged: with Ulysses, attention keeps queries, keys and values as they were exchanged, and its output on both sides.
        """
        out, qkv = self.heads * self.head_dim, (self.heads + 2 * self.kv_heads) * self.head_dim
        values = self.hidden
        if level >= ATTENTION:
            values += out + (qkv + out if exchanged else 0)
        if level >= PROJECTIONS:
            values += self.hidden + (0 if exchanged else qkv)
        if level >= MLP:
            values += 2 * self.intermediate
        return tokens * (values * itemsize + (4 * self.heads if level >= ATTENTION else 0))

    def repeated(self, level: int, tokens: int) -> int:
        """FLOPs that backward of one layer computes again at a level, for one sample of `tokens` tokens; matrix products and attention."""
        out, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        attention = 2 * tokens**2 * out if level < ATTENTION else 0
        projections = 4 * tokens * self.hidden * (out + kv) if level < PROJECTIONS else 0
        return attention + projections + (4 * tokens * self.hidden * self.intermediate if level < MLP else 0)

    @property
    def parameters(self) -> int:
        return self.layers * self.layer_parameters + self.vocab * self.hidden * (1 if self.tied else 2) + self.hidden


@dataclass(frozen=True)
class VisionShape(_Stack):
    """Sizes of a vision tower like SigLIP, of the connector behind it, and of their input in one step.

    patches: patches of all tiles together; merge: patches that the connector (LayerNorm, Linear, GELU, Linear) makes one visual token of;
    positions: patches of a tile; patch_values: values of a patch.
    training, connector: how the tower and the connector are trained. A frozen tower needs no gradients and stores no activations; with a
    frozen connector behind it, both only run forward. heads: of its attention. used: layers that run (default: all).
    """

    width: int
    intermediate: int
    layers: int
    patches: int
    merge: int = 4
    positions: int = 1024
    patch_values: int = 588
    heads: int = 16
    used: int | None = None
    training: Training = Training()
    connector: Training = Training()

    @property
    def linears(self) -> Linears:
        """Linear layers of one layer of the tower."""
        square, wide = (self.width, self.width), (self.width, self.intermediate)
        attention = {f"self_attn.{name}": square for name in ("k_proj", "v_proj", "q_proj", "out_proj")}
        return attention | {"mlp.fc1": wide, "mlp.fc2": wide[::-1]}

    def connector_linears(self, hidden: int) -> Linears:
        """Linear layers of the connector to a decoder of width `hidden`, by their whole names."""
        return {"mlp1.1": (self.merge * self.width, hidden), "mlp1.3": (hidden, hidden)}

    def connector_total(self, hidden: int) -> Parameters:
        """The connector to a decoder of width `hidden`."""
        return self.connector.of(self.connector_parameters(hidden), self.connector_linears(hidden))

    @property
    def learns(self) -> bool:
        """Whether the tower has a backward pass."""
        return self.training.mode != "frozen"

    @property
    def depth(self) -> int:
        """Layers that run."""
        return self.layers if self.used is None else self.used

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

    def layer_kept(self, level: int, itemsize: int) -> int:
        """Bytes that one layer stores for backward at a level of `eagle_kernels.memory.kept`."""
        values = self.width * (1 + (level >= ATTENTION) + 4 * (level >= PROJECTIONS)) + self.intermediate * (level >= MLP)
        return self.patches * (values * itemsize + (4 * self.heads if level >= ATTENTION else 0))

    def repeated(self, kept: Kept, *, grouped: bool = False) -> int:
        """FLOPs that backward of the tower computes again; grouped: all of it."""
        attention, square = 4 * self.patches * self.positions * self.width, 2 * self.patches * self.width**2
        wide = 2 * self.patches * self.width * self.intermediate
        if not self.learns or grouped:
            return 0 if not self.learns else self.depth * (attention + 4 * square + 2 * wide)
        levels = [kept.level(index, self.depth) for index in range(self.depth)]
        return sum(
            (attention if level < ATTENTION else 0) + (4 * square if level < PROJECTIONS else 0) + (wide if level < MLP else 0)
            for level in levels
        )

    def group(self, tiles: int | None) -> "VisionShape":
        """The tower on `tiles` tiles (None: on all)."""
        return self if tiles is None else replace(self, patches=min(self.patches, tiles * self.positions))

    def kept(self, hidden: int, itemsize: int, kept: Kept | None = None, *, grouped: bool = False) -> dict[str, int]:
        """Bytes that forward stores for backward: what the tower's layers keep, the connector's activations, pixels.

        hidden: width of the decoder; itemsize: bytes of an activation; kept: by the tower (default: the inputs of layers); grouped: tower
        and connector keep pixels alone.
        """
        if not self.learns and self.connector.mode == "frozen":
            return {"pixels": self.patches * self.patch_values}
        tower = self.patches * self.width if self.learns else 0
        # The inputs of the post-layernorm, of the connector's LayerNorm, of both Linears and of GELU. The output is stored too, by the
        # operator that writes it into the embeddings.
        features = (self.patches // self.merge) * hidden
        connector = features if grouped else tower + 2 * self.patches * self.width + 3 * features
        pixels = self.patches * self.patch_values * (1 + itemsize if self.learns and not grouped else 1)
        levels = [(kept or Kept()).level(index, self.depth) for index in range(self.depth)]
        stored = sum(self.layer_kept(level, itemsize) for level in levels) if self.learns and not grouped else 0
        return {"vision checkpoints": stored, "connector": connector * itemsize, "pixels": pixels}
