"""The language model: one decoder for the weights of Qwen2, Qwen2.5, Qwen3, Llama and SmolLM2, under their Hugging Face names.

Hidden states are flat, [T, H]: a pack of samples in training, the tokens of a batch without its padding in generation. Only the core of
attention differs, and `AttentionContext` says which: packed attention over a layout, with or without keeping keys and values, or new
tokens against a cache.

Shapes: T tokens, H hidden size, Hq query heads, Hk key/value heads, D head width, B sequences, L their padded length, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eagle_cp import Layout, attention
from eagle_kernels import add_rms_norm, linear_cross_entropy, rms_norm, rope, swiglu, swiglu_mlp
from eagle_model.fused import is_plain, is_plain_linear, is_plain_weight
from eagle_model.rope import head_dim, inverse_frequencies


@dataclass
class AttentionContext:
    """What every layer needs beside the hidden states.

    positions: int [T]. inv_freq: float32 [D/2]. layout: the pack, for packed attention.
    cache: keys and values of earlier tokens (a transformers `Cache`), or None. rows: [T], where each token stands in the padded batch
    (flat index into B * L). mask: bool [B, 1, L, K], which keys each new token sees; None means packed attention. shape: (B, L).
    backend: kernel of packed attention by its name in eagle-cp; None takes the fastest.
    """

    positions: Tensor
    inv_freq: Tensor
    layout: Layout | None = None
    cache: Any = None
    rows: Tensor | None = None
    mask: Tensor | None = None
    shape: tuple[int, int] = (1, 0)
    backend: str | None = None


class Norm(nn.Module):
    """RMSNorm weight; the operator is eagle-kernels'."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class Attention(nn.Module):
    """Grouped-query attention with rotary positions; biases and QK-norm as the language model has them."""

    def __init__(self, config: Any, index: int, scale_factor: float) -> None:
        super().__init__()
        self.index = index
        self.heads, self.kv_heads, self.width = config.num_attention_heads, config.num_key_value_heads, head_dim(config)
        # YaRN scales rotated queries and keys alike, which is the square of it on the logits.
        self.scale = self.width**-0.5 * scale_factor**2
        bias = config.model_type == "qwen2" or bool(getattr(config, "attention_bias", False))
        out_bias = config.model_type != "qwen2" and bias
        self.q_proj = nn.Linear(config.hidden_size, self.heads * self.width, bias=bias)
        self.k_proj = nn.Linear(config.hidden_size, self.kv_heads * self.width, bias=bias)
        self.v_proj = nn.Linear(config.hidden_size, self.kv_heads * self.width, bias=bias)
        self.o_proj = nn.Linear(self.heads * self.width, config.hidden_size, bias=out_bias)
        qk_norm = config.model_type == "qwen3"
        self.q_norm = Norm(self.width, config.rms_norm_eps) if qk_norm else None
        self.k_norm = Norm(self.width, config.rms_norm_eps) if qk_norm else None

    def forward(self, x: Tensor, context: AttentionContext) -> Tensor:
        """x: [T, H] -> [T, H]."""
        tokens = x.shape[0]
        q = self.q_proj(x).view(tokens, self.heads, self.width)
        k = self.k_proj(x).view(tokens, self.kv_heads, self.width)
        v = self.v_proj(x).view(tokens, self.kv_heads, self.width)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rope(q, k, context.positions, context.inv_freq)
        if context.mask is None:
            if context.cache is not None:
                context.cache.update(self._pad(k, context), self._pad(v, context), self.index)
            assert context.layout is not None
            out = attention(q, k, v, context.layout, scale=self.scale, backend=context.backend)
        else:
            keys, values = context.cache.update(self._pad(k, context), self._pad(v, context), self.index)
            padded = F.scaled_dot_product_attention(
                self._pad(q, context), keys, values, attn_mask=context.mask, scale=self.scale, enable_gqa=self.heads != self.kv_heads
            )
            out = padded.transpose(1, 2).flatten(0, 1)[context.rows]
        return self.o_proj(out.reshape(tokens, self.heads * self.width))

    @staticmethod
    def _pad(x: Tensor, context: AttentionContext) -> Tensor:
        """[T, heads, D] -> [B, heads, L, D], zeros where the batch is padded."""
        batch, length = context.shape
        if x.shape[0] != batch * length:
            assert context.rows is not None
            x = x.new_zeros(batch * length, *x.shape[1:]).index_copy(0, context.rows, x)
        return x.view(batch, length, *x.shape[1:]).transpose(1, 2)


class GatedMLP(nn.Module):
    """`down(silu(gate(x)) * up(x))`; one fused operator when all three are plain linears without biases."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        bias = bool(getattr(config, "mlp_bias", False))
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=bias)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        gate, up, down = self.gate_proj, self.up_proj, self.down_proj
        if is_plain_linear(gate) and is_plain_linear(up) and is_plain_linear(down) and gate.bias is None:
            return swiglu_mlp(x, gate.weight, up.weight, down.weight)
        return down(swiglu(gate(x), up(x)))


class DecoderLayer(nn.Module):
    """Attention and MLP with their residuals: [T, H] -> [T, H].

    `checkpoint` (a function like `torch.utils.checkpoint.checkpoint`) rebuilds the layer in backward; it stands inside `forward`, so that
    wrappers of the module (FSDP) see one forward.
    """

    def __init__(self, config: Any, index: int, scale_factor: float) -> None:
        super().__init__()
        self.self_attn = Attention(config, index, scale_factor)
        self.mlp = GatedMLP(config)
        self.input_layernorm = Norm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = Norm(config.hidden_size, config.rms_norm_eps)
        self.checkpoint: Callable[..., Tensor] | None = None

    def forward(self, hidden: Tensor, context: AttentionContext) -> Tensor:
        if self.checkpoint is not None and torch.is_grad_enabled():
            return self.checkpoint(self.body, hidden, context)
        return self.body(hidden, context)

    def body(self, hidden: Tensor, context: AttentionContext) -> Tensor:
        mixed = self.self_attn(self.input_layernorm(hidden), context)
        norm = self.post_attention_layernorm
        if is_plain(norm, Norm):
            normed, hidden = add_rms_norm(hidden, mixed, norm.weight, norm.eps)
        else:
            hidden = hidden + mixed
            normed = norm(hidden)
        return hidden + self.mlp(normed)


class Decoder(nn.Module):
    """Embedding, layers and final norm."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
        if kinds != {"full_attention"}:
            raise ValueError(f"text_config asks for layers of the kinds {sorted(kinds)}; only full attention is supported")
        if config.hidden_act != "silu":
            raise ValueError(f"text_config.hidden_act is {config.hidden_act!r}; only 'silu' is supported")
        if config.attention_dropout:
            raise ValueError(f"text_config.attention_dropout is {config.attention_dropout}; dropout isn't supported, set it to 0")
        self.frequencies, scale_factor = inverse_frequencies(config)
        self._frequencies_on: dict[torch.device, Tensor] = {}
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, index, scale_factor) for index in range(config.num_hidden_layers))
        self.norm = Norm(config.hidden_size, config.rms_norm_eps)

    def inv_freq(self, device: torch.device) -> Tensor:
        """Inverse frequencies on `device`: always float32, and no buffer that a cast or an empty initialisation could spoil."""
        if device not in self._frequencies_on:
            # What is made in inference mode could never be used in training again.
            with torch.inference_mode(False):
                self._frequencies_on[device] = self.frequencies.to(device)
        return self._frequencies_on[device]

    def forward(self, hidden: Tensor, context: AttentionContext, states: list[Tensor] | None = None) -> Tensor:
        """hidden: embeddings [T, H] -> [T, H], after the final norm.

        states: collects the hidden states [T, H] as transformers orders them: embeddings, the output of every layer but the last, and the
        normalised output of the last.
        """
        for layer in self.layers:
            if states is not None:
                states.append(hidden)
            hidden = layer(hidden, context)
        hidden = self.norm(hidden)
        if states is not None:
            states.append(hidden)
        return hidden


class Head(nn.Linear):
    """The language head: logits, or the loss without ever holding the logits of a whole sequence."""

    def forward(self, hidden: Tensor, targets: Tensor | None = None, **options: Any) -> Tensor:  # type: ignore[override]
        """hidden: [..., H] -> logits [..., V]; with targets [T] -> loss, `options` being those of `eagle_kernels.linear_cross_entropy`."""
        if targets is None:
            return F.linear(hidden, self.weight)
        return linear_cross_entropy(hidden, self.weight, targets, **options)


def head_loss(
    head: nn.Module,
    hidden: Tensor,
    targets: Tensor,
    *,
    token_weights: Tensor | None = None,
    denominator: Tensor | None = None,
    num_kept: int | None = None,
) -> Tensor:
    """Loss of hidden states [T, H] and targets [T] through the head: `sum_i w_i l_i / denominator`, 0-dim float32.

    Arguments are those of `eagle_kernels.linear_cross_entropy`, which computes it for the model's own `Head`. A head that something else
    has replaced or wrapped (an adapter, a quantised layer) is called; the logits of all labelled tokens are then in memory at once.
    """
    if isinstance(head, Head) and "forward" not in head.__dict__ and is_plain_weight(head._parameters.get("weight")):
        return head(hidden, targets, token_weights=token_weights, denominator=denominator, num_kept=num_kept)
    kept = targets != -100
    losses = F.cross_entropy(head(hidden[kept]).float(), targets[kept], reduction="none")
    weights = torch.ones_like(losses) if token_weights is None else token_weights[kept].to(losses)
    return (losses * weights).sum() / (weights.sum() if denominator is None else denominator)


class LanguageModel(nn.Module):
    """Decoder and head, as `language_model.model.*` and `language_model.lm_head.weight`."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.model = Decoder(config)
        self.lm_head = Head(config.hidden_size, config.vocab_size, bias=False)
