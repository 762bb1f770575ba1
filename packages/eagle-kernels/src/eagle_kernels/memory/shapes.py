"""Sizes of the model's parts that `plan_memory` needs."""

from dataclasses import dataclass, replace

from eagle_kernels.memory.kept import ATTENTION, MLP, PROJECTIONS, Kept


@dataclass(frozen=True)
class DecoderShape:
    """Sizes of a decoder like Llama or Qwen. tied: the head shares the embedding's weight."""

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
        """Parameters of one decoder layer, with biases of q, k and v."""
        attention = self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads) + self.head_dim * (self.heads + 2 * self.kv_heads)
        return attention + 3 * self.hidden * self.intermediate + 2 * self.hidden

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
class VisionShape:
    """Sizes of a vision tower like SigLIP, of the connector behind it, and of their input in one step.

    patches: patches of all tiles together; merge: patches that the connector (LayerNorm, Linear, GELU, Linear) makes one visual token of;
    positions: patches of a tile; patch_values: values of a patch.
    frozen: the tower needs no gradients and stores no activations; the connector is still trained. heads: of its attention. used: layers
    that run (default: all).
    """

    width: int
    intermediate: int
    layers: int
    patches: int
    frozen: bool = False
    merge: int = 4
    positions: int = 1024
    patch_values: int = 588
    heads: int = 16
    used: int | None = None

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
        if self.frozen or grouped:
            return 0 if self.frozen else self.depth * (attention + 4 * square + 2 * wide)
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

        hidden: width of the decoder; itemsize: bytes of an activation; kept: by the tower (default: the inputs of layers); grouped: the
        tower keeps pixels alone.
        """
        tower = 0 if self.frozen else self.patches * self.width
        # The inputs of the post-layernorm, of the connector's LayerNorm, of both Linears and of GELU. The output is stored too, by the
        # operator that writes it into the embeddings.
        connector = tower + 2 * self.patches * self.width + 3 * (self.patches // self.merge) * hidden
        pixels = self.patches * self.patch_values * (1 if self.frozen or grouped else 1 + itemsize)
        levels = [(kept or Kept()).level(index, self.depth) for index in range(self.depth)]
        stored = 0 if self.frozen or grouped else sum(self.layer_kept(level, itemsize) for level in levels)
        return {"vision checkpoints": stored, "connector": connector * itemsize, "pixels": pixels}
