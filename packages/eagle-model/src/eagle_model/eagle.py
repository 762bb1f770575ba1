"""Eagle 2.5: vision tower, pixel shuffle, connector and decoder, in two modes of one forward.

Packed (training): a `PackedBatch`, whose positions restart with every sample, and a `Layout` that keeps samples apart.
Padded (generation, Trainer, TRL): batches and a key/value cache, as transformers calls a model. Both run the same layers.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, DynamicCache
from transformers.cache_utils import Cache

from eagle_cp import Layout, exchange_tiles
from eagle_kernels import Kept, OffloadEngine
from eagle_model import activation_checkpointing
from eagle_model.batch import PackedBatch
from eagle_model.configuration import EagleConfig
from eagle_model.generation import EagleGenerationMixin
from eagle_model.language.attention import AttentionInputs
from eagle_model.language.head import head_loss, token_scores
from eagle_model.modules import EaglePreTrainedModel
from eagle_model.padded import CACHE_FIELD, Arrangement, Backbone, EagleOutput, arrange, refuse_unknown
from eagle_model.prompt import IGNORE_INDEX
from eagle_model.replay import ReplayedSteps


class EagleForConditionalGeneration(EaglePreTrainedModel, EagleGenerationMixin):
    """The model; its tensors have the names of the released checkpoints. `parts` and `blocks` give its modules without these names."""

    @property
    def base_model(self) -> Any:
        """The model without its head, for callers that bring their own loss (TRL) or head (reward models)."""
        return Backbone(self)

    def get_compiled_call(self, compile_config: Any) -> Callable[..., Any]:
        """As in transformers, which calls it for decode steps with a cache of fixed size. The backend `cudagraphs` replays the step as one
        CUDA graph (`eagle_model.replay`) instead of compiling it.
        """
        if compile_config is not None and compile_config.backend == "cudagraphs":
            return ReplayedSteps(self)
        return super().get_compiled_call(compile_config)

    # ---- activation checkpointing ------------------------------------------------------------------------------------------------

    def set_activation_checkpointing(
        self,
        mode: str,
        engine: OffloadEngine | None = None,
        *,
        kept: Kept | None = None,
        vision_kept: Kept | None = None,
        vision_group: int | None = None,
        mlp_rows: int | None = None,
    ) -> None:
        """What backward finds of the activations of a layer.

        `keep`: all of them. `recompute`: its input. `selective`: its input, and what `kept` says of the decoder's layers and `vision_kept`
        of the vision tower's (default: all that selective activation checkpointing can keep). `offload`: its input, which for layers of the
        decoder is in host memory until then (by `engine`; without one inputs stay on their devices).
        With `selective` and `offload`: with `vision_group` tower and connector keep pixels alone, and backward runs them again for so many
        tiles at a time, of which the tower keeps what `vision_kept` says (not where ranks share sharded parameters and have different
        numbers of tiles); with `mlp_rows` decoder layers that do not keep gate and up run their MLP on so many tokens at a time (on a GPU;
        not with adapters, biases or weights in 4 bits). The gradients of all are the same.
        Call it before forward, as often as wanted, and after adapters with dropout were added: `recompute` repeats random numbers where a
        module draws them. Raises ValueError for another mode, and for `selective` and `offload` with dropout.
        """
        activation_checkpointing.set_mode(self, mode, engine, kept, vision_kept, vision_group, mlp_rows)

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func: Callable[..., Any] = checkpoint, every_n_layers: int = 1
    ) -> None:
        """What `gradient_checkpointing_enable` and `gradient_checkpointing_disable` of transformers call.

        Recomputation is always the non-reentrant kind, also when `use_reentrant=True` is passed: it gives the same gradients, and reaches
        adapters whose layer's input needs no gradient, where the reentrant kind gives none.
        """
        activation_checkpointing.set_layers(self, enable, gradient_checkpointing_func, every_n_layers)

    # ---- forward -----------------------------------------------------------------------------------------------------------------

    def forward(
        self,
        input_ids: Tensor | PackedBatch | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        past_key_values: Any = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        *,
        layout: Layout | None = None,
        inputs_embeds: Tensor | None = None,
        cache: Any = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        num_items_in_batch: Tensor | float | None = None,
        mm_token_type_ids: Tensor | None = None,
        score_tokens: bool = False,
        token_losses: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Packed mode, `forward(batch, layout=layout)`, or padded mode, `forward(input_ids, ...)`.

        Packed: the first argument is a `PackedBatch` of tensors; layout: which tokens belong together (default: the batch on one rank).
        Gives the loss, `sum_i w_i l_i / denominator`, or logits [T, V] of a batch without targets. score_tokens: instead of the loss, the
        negative log-likelihood of every target and whether it is the most likely token. token_losses: with the loss, also the unweighted
        loss of every token [T], without gradient. With several context parallel ranks the batch is the rank's own (`PackedBatch.shard`),
        and losses and gradients of the ranks add up.

        Padded, as transformers calls it: input_ids [B, L] or inputs_embeds [B, L, H]; attention_mask [B, L] (with a cache: over cached and
        new tokens), padding on either side; pixel_values: uint8 tiles [N, s, s, 3] or normalised float [N, 3, s, s]; labels [B, L], not
        shifted; num_items_in_batch: divisor of the summed loss (default: the number of labels here, a mean); logits_to_keep: only the
        last so many positions (0: all), or their indices; cache: keys and values of earlier tokens (past_key_values is the older name);
        output_hidden_states: also the hidden states of every layer; mm_token_type_ids: not read, input_ids say where visual tokens are.
        Gives logits, the loss with labels, and the cache with use_cache.

        Returns an `EagleOutput`, or its values as a tuple with return_dict=False. Raises TypeError for unknown arguments and ValueError
        for arguments that do not fit together.
        """
        refuse_unknown(kwargs)
        if return_dict is None:
            return_dict = getattr(self.config, "return_dict", True)
        if isinstance(input_ids, PackedBatch):
            others = {
                "attention_mask": attention_mask,
                "position_ids": position_ids,
                "pixel_values": pixel_values,
                "past_key_values": past_key_values,
                "labels": labels,
                "inputs_embeds": inputs_embeds,
                "cache": cache,
                "output_hidden_states": output_hidden_states or None,
            }
            if wrong := [name for name, value in others.items() if value is not None]:
                raise TypeError(f"packed mode takes a PackedBatch and layout=..., but {', '.join(wrong)} arrived too")
            output = self._forward_packed(input_ids, layout, score_tokens, token_losses)
            return output if return_dict else output.to_tuple()
        if layout is not None or score_tokens or token_losses:
            raise TypeError("layout, score_tokens and token_losses belong to packed mode, whose first argument is a PackedBatch")
        arrangement, output = self.run_padded(
            input_ids,
            attention_mask,
            position_ids=position_ids,
            pixel_values=pixel_values,
            inputs_embeds=inputs_embeds,
            past_key_values=past_key_values,
            cache=cache,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
        )
        head, hidden = self.language_model.lm_head, output.last_hidden_state
        assert hidden is not None
        loss = None
        if labels is not None:
            targets = torch.full_like(labels, IGNORE_INDEX)
            targets[:, :-1] = labels[:, 1:]
            denominator = None
            if num_items_in_batch is not None:
                denominator = torch.as_tensor(num_items_in_batch, dtype=torch.float32, device=hidden.device).reshape(()).clamp_min(1)
            states, targets = hidden.flatten(0, 1), targets.to(hidden.device).flatten()
            if arrangement.rows is not None:
                rows = arrangement.rows.to(hidden.device)
                states, targets = states[rows], targets[rows]
            loss = head_loss(head, states, targets, denominator=denominator)
        if not isinstance(logits_to_keep, int):
            hidden = hidden[:, logits_to_keep]
        elif logits_to_keep:
            hidden = hidden[:, -logits_to_keep:]
        output = replace(output, loss=loss, logits=head(hidden))
        return output if return_dict else output.to_tuple()

    def _forward_packed(self, batch: PackedBatch, layout: Layout | None, score_tokens: bool, token_losses: bool) -> EagleOutput:
        if not isinstance(batch.input_ids, Tensor):
            raise TypeError(f"the packed batch holds {type(batch.input_ids).__name__} arrays; call batch.to(device) first")
        if layout is None:
            if batch.tile_plan is not None:
                raise ValueError("the packed batch is one rank's part of a pack; pass the layout that it was split by")
            layout = batch.layout()
        else:
            batch.check_layout(layout)
        hidden = self.language_model.model.embed_tokens(batch.input_ids)
        if batch.tiles is not None:
            features = self.image_features(batch.tiles).flatten(0, 1)
            if batch.tile_plan is not None:
                features = exchange_tiles(features, layout, batch.tile_plan)
            hidden = self.place_features(hidden, features, batch.visual_index)
        elif batch.visual_index is not None and len(batch.visual_index):
            raise ValueError(
                f"the packed batch has {len(batch.visual_index)} visual tokens (visual_index) but no tiles; give both, or neither"
            )
        inputs = AttentionInputs(batch.position_ids, self._inv_freq(hidden), layout, backend=self.attention_backend)
        hidden = self.language_model.model(hidden, inputs)
        head = self.language_model.lm_head
        if batch.targets is None:
            return EagleOutput(logits=head(hidden))
        if score_tokens:
            losses, right = token_scores(head, hidden, batch.targets)
            return EagleOutput(token_losses=losses, token_right=right)
        loss, losses = head_loss(
            head,
            hidden,
            batch.targets,
            token_weights=batch.token_weights,
            denominator=batch.denominator,
            num_kept=batch.num_kept,
            token_losses=True,
        )
        return EagleOutput(loss=loss, token_losses=losses if token_losses else None)  # type: ignore[arg-type]

    def run_padded(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        position_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        past_key_values: Cache | None = None,
        cache: Cache | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
    ) -> tuple[Arrangement, EagleOutput]:
        """A padded batch through vision tower and decoder, without the head; arguments as in `forward`.

        Gives where the tokens stand, and an output with `last_hidden_state`, the cache and `hidden_states`, as far as they are wanted.
        """
        tokens = input_ids if inputs_embeds is None else inputs_embeds
        if tokens is None or (input_ids is not None and inputs_embeds is not None):
            raise ValueError(f"give input_ids or inputs_embeds; {'neither' if tokens is None else 'both'} of the two arrived")
        cache = past_key_values if cache is None else cache
        if self.gradient_checkpointing and torch.is_grad_enabled() and (cache is not None or use_cache):
            raise ValueError(
                "a key/value cache and activation checkpointing do not go together: recomputation would add keys and values twice; "
                "pass use_cache=False, or run without gradients (torch.no_grad)"
            )
        arrangement = arrange(tokens, attention_mask, position_ids, cache)
        if use_cache and cache is None:
            cache = DynamicCache()
        flat = tokens.flatten(0, 1)
        if arrangement.rows is not None:
            flat = flat[arrangement.rows]
        if inputs_embeds is None:
            self._check_image_tokens(flat, pixel_values, cache)
        hidden = self.embed(flat, pixel_values) if inputs_embeds is None else self._fill_embeddings(flat, pixel_values)
        inputs = AttentionInputs(
            positions=arrangement.positions,
            inv_freq=self._inv_freq(hidden),
            layout=arrangement.layout,
            cache=cache,
            rows=arrangement.rows,
            mask=arrangement.mask,
            shape=arrangement.shape,
            keys=arrangement.keys,
        )
        if output_hidden_states is None:
            output_hidden_states = getattr(self.config, "output_hidden_states", False)
        states: list[Tensor] | None = [] if output_hidden_states else None
        hidden = self.language_model.model(hidden, inputs, states)
        values: dict[str, Any] = {CACHE_FIELD: cache if use_cache else None, "last_hidden_state": arrangement.pad(hidden)}
        if states is not None:
            values["hidden_states"] = tuple(arrangement.pad(state) for state in states)
        return arrangement, EagleOutput(**values)

    def _check_image_tokens(self, ids: Tensor, tiles: Tensor | None, cache: Cache | None) -> None:
        """Raises ValueError for flat ids [T] of a prompt with image tokens and no tiles. Later calls of an answer are not looked at: the
        model may have chosen the image token."""
        first = cache is None or (isinstance(cache, DynamicCache) and not cache.get_seq_length())
        if first and tiles is None and self.config.image_token_index is not None:
            self.check_features(int((ids == self.config.image_token_index).sum()), 0)

    def _fill_embeddings(self, embeddings: Tensor, tiles: Tensor | None) -> Tensor:
        """Flat embeddings [T, H], the embedding of the image token replaced by the features of the tiles in order."""
        if tiles is None:
            return embeddings
        token = torch.tensor(self.image_token(), device=embeddings.device)
        image = self.language_model.model.embed_tokens(token).to(embeddings.dtype)
        index = (embeddings == image).all(-1).nonzero().squeeze(1)
        return self.place_features(embeddings, self.encode_tiles(tiles).flatten(0, 1), index)

    def _inv_freq(self, hidden: Tensor) -> Tensor:
        return self.language_model.model.inv_freq(hidden.device)


for auto in (AutoModelForImageTextToText, AutoModelForCausalLM):
    auto.register(EagleConfig, EagleForConditionalGeneration, exist_ok=True)
