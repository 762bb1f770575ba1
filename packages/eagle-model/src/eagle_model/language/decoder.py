"""The decoder: embedding, layers, final norm and head, for the weights of every family in `spec.py`.

Hidden states are flat, [T, H]: a pack of samples in training, the tokens of a batch without its padding in generation.
Shapes: T tokens, H hidden size, V vocabulary.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from eagle_kernels import Recompute, add_rms_norm
from eagle_model.fused import is_plain
from eagle_model.language.attention import Attention, AttentionInputs, Norm
from eagle_model.language.head import Head
from eagle_model.language.mlp import GatedMLP
from eagle_model.language.rope import inverse_frequencies
from eagle_model.language.spec import DecoderSpec, decoder_spec
from eagle_model.pieces import WHOLE, Pieces


class DecoderLayer(nn.Module):
    """Attention and MLP with their residuals: [T, H] -> [T, H].

    `checkpoint` (a function like `torch.utils.checkpoint.checkpoint`) recomputes the layer in backward. `kept`, a level of
    `eagle_kernels.memory`, recomputes the pieces that this level does not keep. Both act inside `forward`, so that wrappers of the module
    (FSDP) see one forward.
    """

    def __init__(self, spec: DecoderSpec, index: int, scale_factor: float) -> None:
        super().__init__()
        self.self_attn = Attention(spec, index, scale_factor)
        self.mlp = GatedMLP(spec)
        self.input_layernorm = Norm(spec.hidden_size, spec.norm_eps)
        self.post_attention_layernorm = Norm(spec.hidden_size, spec.norm_eps)
        self.checkpoint: Callable[..., Tensor] | None = None
        self.kept: int | None = None

    def forward(self, hidden: Tensor, inputs: AttentionInputs) -> Tensor:
        if not torch.is_grad_enabled():
            return self.body(hidden, inputs)
        if self.checkpoint is not None:
            return self.checkpoint(self.body, hidden, inputs)
        if self.kept is None:
            return self.body(hidden, inputs)
        with Recompute() as again:
            return self.body(hidden, inputs, Pieces(again, self.kept, exchanged=inputs.exchanged))

    def body(self, hidden: Tensor, inputs: AttentionInputs, pieces: Pieces = WHOLE) -> Tensor:
        mixed = self.self_attn(pieces.cheap(self.input_layernorm, hidden), inputs, pieces)
        normed, hidden = pieces.cheap(self._add_norm, hidden, mixed)
        return hidden + self.mlp(normed, pieces)

    def _add_norm(self, hidden: Tensor, mixed: Tensor) -> tuple[Tensor, Tensor]:
        """The second norm of the sum, and the sum."""
        norm = self.post_attention_layernorm
        if is_plain(norm, Norm):
            return add_rms_norm(hidden, mixed, norm.weight, norm.eps)
        hidden = hidden + mixed
        return norm(hidden), hidden


class Decoder(nn.Module):
    """Embedding, layers and final norm."""

    def __init__(self, config: PretrainedConfig) -> None:
        super().__init__()
        spec = decoder_spec(config)
        self.frequencies, scale_factor = inverse_frequencies(config)
        self._frequencies_on: dict[torch.device, Tensor] = {}
        self.embed_tokens = nn.Embedding(spec.vocab_size, spec.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(spec, index, scale_factor) for index in range(spec.layers))
        self.norm = Norm(spec.hidden_size, spec.norm_eps)

    def inv_freq(self, device: torch.device) -> Tensor:
        """Inverse frequencies on `device`: always float32, and not a buffer, which a cast or an empty initialisation would change."""
        if device not in self._frequencies_on:
            # A tensor made in inference mode cannot be used in training.
            with torch.inference_mode(False):
                self._frequencies_on[device] = self.frequencies.to(device)
        return self._frequencies_on[device]

    def forward(self, hidden: Tensor, inputs: AttentionInputs, states: list[Tensor] | None = None) -> Tensor:
        """hidden: embeddings [T, H] -> [T, H], after the final norm.

        states: collects the hidden states [T, H] as transformers orders them: embeddings, the output of every layer but the last, and the
        normalised output of the last.
        """
        for layer in self.layers:
            if states is not None:
                states.append(hidden)
            hidden = layer(hidden, inputs)
        hidden = self.norm(hidden)
        if states is not None:
            states.append(hidden)
        return hidden


class LanguageModel(nn.Module):
    """Decoder and head, as `language_model.model.*` and `language_model.lm_head.weight`."""

    def __init__(self, config: PretrainedConfig) -> None:
        super().__init__()
        self.model = Decoder(config)
        self.lm_head = Head(config.hidden_size, config.vocab_size, bias=False)
