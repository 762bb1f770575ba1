"""Eagle 2.5: vision tower, pixel shuffle, connector and decoder, in two modes of one forward.

Packed (training): a `PackedBatch`, whose positions restart with every sample, and a `Layout` that keeps samples apart.
Padded (generation, Trainer, TRL): batches and a key/value cache, as transformers calls a model. Both run the same layers.
"""

import logging
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, DynamicCache, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.siglip.modeling_siglip import SiglipVisionEmbeddings

from eagle_cp import Layout, exchange_tiles
from eagle_kernels import Kept, OffloadEngine, Recompute, offload_checkpoint
from eagle_model.batch import PackedBatch
from eagle_model.checkpoint import HEAD, finish_folder, lacks_head
from eagle_model.configuration import EagleConfig
from eagle_model.initial import draws
from eagle_model.language.attention import AttentionInputs
from eagle_model.language.decoder import LanguageModel
from eagle_model.language.head import Head, head_loss, token_scores
from eagle_model.padded import CACHE_FIELD, Arrangement, Backbone, EagleOutput, arrange, cached_mask, refuse_unknown
from eagle_model.prefill import prefill_in_chunks
from eagle_model.prompt import IGNORE_INDEX
from eagle_model.replay import ReplayedSteps
from eagle_model.vision.connector import make_connector, pixel_shuffle
from eagle_model.vision.siglip import VisionModel, tiles_at_once

logger = logging.getLogger(__name__)

#: Names of attention kernels that transformers runs the vision tower with; None means its choice.
VISION_KERNELS = (None, "sdpa", "eager")
#: Modes of activation checkpointing.
MODES = ("keep", "recompute", "selective", "offload")
#: Most tiles that the tower encodes at a time without gradients: 32768 patches of 448-pixel tiles, 0.6 GiB for their widest activation.
ENCODED_TILES = 32
HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")


class EagleForConditionalGeneration(PreTrainedModel, GenerationMixin):
    """The model; its tensors have the names of the released checkpoints. `parts` and `blocks` give its modules without these names."""

    config_class = EagleConfig
    config: EagleConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    input_modalities = ["image", "text"]  # noqa: RUF012
    _no_split_modules = ["DecoderLayer", "VisionLayer"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_attention_backend = False
    supports_gradient_checkpointing = True
    #: `forward` divides the sum of the losses by `num_items_in_batch`, which transformers' Trainer counts over a whole step.
    accepts_loss_kwargs = True
    _tied_weights_keys = {HEAD: "language_model.model.embed_tokens.weight"}  # noqa: RUF012
    _keys_to_ignore_on_load_unexpected = [r"^vision_model\.vision_model\.head\."]  # noqa: RUF012

    def __init__(self, config: EagleConfig) -> None:
        if config._attn_implementation not in VISION_KERNELS:
            config._attn_implementation = self._check_and_adjust_attn_implementation(config._attn_implementation)
        super().__init__(config)
        vision, text = config.vision_config, config.text_config
        if config.tile_size != vision.image_size:
            raise ValueError(
                f"force_image_size is {config.force_image_size}, but the vision tower has positions for {vision.image_size} pixels; "
                "set vision_config.image_size to the same size and resize its position embedding"
            )
        side = vision.image_size // vision.patch_size
        block = round(1 / config.downsample_ratio) if config.use_pixel_shuffle else 1
        if config.use_pixel_shuffle and (side % block or abs(block * config.downsample_ratio - 1) > 1e-6):
            raise ValueError(f"downsample_ratio {config.downsample_ratio} must be 1/n, and n divide the {side} patches a side of a tile")
        width = vision.hidden_size * block**2
        self.vision_model = VisionModel(vision, config.select_layer)
        self.mlp1 = make_connector(width, text.hidden_size, config.mlp_connector_layers)
        self.language_model = LanguageModel(text)
        #: Kernel of packed attention by its name in eagle-cp; None takes the fastest that runs.
        self.attention_backend: str | None = None
        #: Whether layers are recomputed in backward; set by `set_activation_checkpointing` and `gradient_checkpointing_enable`.
        self.gradient_checkpointing = False
        #: Tiles of a group: backward runs tower and connector again for one group after the other, from the pixels. None: all at once.
        self.vision_group: int | None = None
        self.post_init()

    # ---- parts -------------------------------------------------------------------------------------------------------------------

    def parts(self) -> dict[str, nn.Module]:
        """The three parts that can be trained apart, by name; every parameter is in exactly one of them."""
        return {"vision": self.vision_model, "connector": self.mlp1, "language": self.language_model}

    def blocks(self, part: str | None = None) -> list[nn.Module]:
        """The repeated layers of a part (default: of all parts) in the order in which forward runs them.

        Each is a module that is called through `forward` and owns its parameters, so each can be a unit of FSDP or be recomputed.
        """
        vision, language = list(self.vision_model.vision_model.encoder.layers), list(self.language_model.model.layers)
        return {None: vision + language, "vision": vision, "connector": [], "language": language}[part]

    @property
    def tokens_per_tile(self) -> int:
        """`k`: visual tokens of one tile."""
        return self.config.tokens_per_tile

    def image_features(self, tiles: Tensor) -> Tensor:
        """Tokens of tiles: uint8 [N, s, s, 3] or normalised float [N, 3, s, s] -> [N, k, H].

        With no tiles (N = 0) the tower still runs, on one black tile whose features are dropped: every rank takes part in the
        collectives of sharded parameters, and the tower's gradients exist and are zero.
        """
        real = tiles.shape[0]
        if real == 0:
            tiles = tiles.new_zeros(1, *tiles.shape[1:])
        group = self.vision_group if torch.is_grad_enabled() else None
        if group is None:
            return self._encode(tiles)[:real]
        with Recompute() as again:
            parts = [again(self._encode, part) for part in tiles.split(group)]
        return (parts[0] if len(parts) == 1 else torch.cat(parts))[:real]

    def _encode(self, tiles: Tensor) -> Tensor:
        """Tower and connector, on all tiles at once."""
        return self._connect(self.vision_model(tiles))

    def encode_tiles(self, tiles: Tensor) -> Tensor:
        """`image_features`; without gradients in groups of tiles (`tiles_at_once`), so that memory for activations does not grow with their
        number. Not where parameters are sharded: ranks with different numbers of tiles would run the tower different numbers of times.
        """
        if torch.is_grad_enabled() or any(isinstance(p, DTensor) for p in self.vision_model.parameters()):
            return self.image_features(tiles)
        group = tiles_at_once(self.config.vision_config, next(self.vision_model.parameters()), ENCODED_TILES)
        if len(tiles) <= group:
            return self.image_features(tiles)
        features: Tensor | None = None
        for start in range(0, len(tiles), group):
            part = self.image_features(tiles[start : start + group])
            if features is None:
                features = part.new_empty(len(tiles), *part.shape[1:])
            features[start : start + len(part)] = part
        assert features is not None
        return features

    def get_image_features(self, pixel_values: Tensor, return_dict: bool | None = None) -> Any:
        """Features of tiles as transformers' vision-language models return them.

        pixel_values: uint8 [N, s, s, 3] or normalised float [N, 3, s, s]. Gives `last_hidden_state` [N, P, d], the output of the vision
        tower, and `pooler_output` [N, k, H], the visual tokens (`image_features`); with return_dict=False, the two as a tuple.
        """
        hidden = self.vision_model(pixel_values)
        output = BaseModelOutputWithPooling(last_hidden_state=hidden, pooler_output=self._connect(hidden))  # type: ignore[arg-type]
        return output.to_tuple() if return_dict is False else output

    def _connect(self, hidden: Tensor) -> Tensor:
        """Vision hidden states [N, P, d] -> visual tokens [N, k, H]."""
        if self.config.use_pixel_shuffle:
            side = round(hidden.shape[1] ** 0.5)
            hidden = pixel_shuffle(hidden.unflatten(1, (side, side)), self.config.downsample_ratio).flatten(1, 2)
        return self.mlp1(hidden)

    def embed(self, input_ids: Tensor, tiles: Tensor | None, visual_index: Tensor | None = None) -> Tensor:
        """Embeddings [T, H] of flat ids [T], visual tokens replaced by the features of the tiles in order.

        visual_index: int64 [n], positions of the visual tokens; default: searched for in input_ids, which waits for the device.
        Raises ValueError when the number of visual tokens is not that of the features.
        """
        hidden = self.language_model.model.embed_tokens(input_ids)
        if tiles is None:
            return hidden
        if visual_index is None:
            visual_index = (input_ids == self._image_token()).nonzero().squeeze(1)
        return self._place(hidden, self.encode_tiles(tiles).flatten(0, 1), visual_index)

    def _image_token(self) -> int:
        if self.config.image_token_index is None:
            raise ValueError("config.image_token_index is not set; take it from the tokenizer: convert_tokens_to_ids('<IMG_CONTEXT>')")
        return self.config.image_token_index

    def _place(self, hidden: Tensor, features: Tensor, index: Tensor) -> Tensor:
        """Embeddings [T, H] with `features` [n, H] at `index` [n]."""
        self.check_features(index.shape[0], features.shape[0])
        # Parts may be on different devices (`device_map`).
        return hidden.index_copy(0, index.to(hidden.device), features.to(hidden))

    def check_features(self, visual_tokens: int, features: int) -> None:
        """Raises ValueError when a prompt of so many visual tokens gets another number of features (a rank's part may end in a tile)."""
        if visual_tokens != features:
            raise ValueError(
                f"{visual_tokens} visual tokens in input_ids, but {features // self.tokens_per_tile} tiles of "
                f"{self.tokens_per_tile} tokens give {features}; the prompt and the tiles must come from the same processor settings"
            )

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
        if mode not in MODES:
            raise ValueError(f"activation checkpointing mode {mode!r}; it must be one of {', '.join(map(repr, MODES))}")
        dropout = any(isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0 for module in self.modules())
        if dropout and mode in ("selective", "offload"):
            raise ValueError(
                f"activation checkpointing mode {mode!r} does not restore the random state that dropout needs; set the dropout of the "
                "adapters to 0 or use 'recompute'"
            )
        again = mode in ("selective", "offload")
        self.vision_group = vision_group if again else None
        for layer in self.language_model.model.layers:
            layer.mlp.rows = mlp_rows if again else None  # type: ignore[union-attr, assignment]
        whole = partial(checkpoint, use_reentrant=False, preserve_rng_state=True) if dropout and mode == "recompute" else None
        self._set_checkpoints(whole, partial(offload_checkpoint, engine=engine) if mode == "offload" else whole)
        tower, layers = self._tower_layers(), list(self.language_model.model.layers)
        nothing = Kept()
        if mode == "selective":
            self._keep(tower, Kept.all(len(tower)) if vision_kept is None else vision_kept)
            self._keep(layers, Kept.all(len(layers)) if kept is None else kept)
        elif mode == "offload" and vision_group is not None:
            self._keep(tower, Kept.all(len(tower)) if vision_kept is None else vision_kept)
            self._keep(layers, None)
        else:
            self._keep(tower, nothing if mode in ("recompute", "offload") and not dropout else None)
            self._keep(layers, nothing if mode == "recompute" and not dropout else None)
        self.gradient_checkpointing = mode != "keep"

    def _tower_layers(self) -> list[nn.Module]:
        """The layers of the vision tower that run."""
        tower = self.vision_model.vision_model
        return list(tower.encoder.layers[: tower.depth])

    @staticmethod
    def _keep(layers: list[nn.Module], kept: Kept | None) -> None:
        for index, layer in enumerate(layers):
            layer.kept = None if kept is None else kept.level(index, len(layers))  # type: ignore[assignment]

    def _set_checkpoints(self, vision: Callable[..., Tensor] | None, decoder: Callable[..., Tensor] | None, every: int = 1) -> None:
        """Let the layers of the vision tower and of the decoder (every `every`-th) run through these functions."""
        tower = self.vision_model.vision_model
        tower.checkpoint, tower.checkpoint_every = vision, every
        for index, layer in enumerate(self.language_model.model.layers):
            layer.checkpoint = decoder if index % every == 0 else None  # type: ignore[assignment]
        self.gradient_checkpointing = vision is not None or decoder is not None

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func: Callable[..., Any] = checkpoint, every_n_layers: int = 1
    ) -> None:
        """What `gradient_checkpointing_enable` and `gradient_checkpointing_disable` of transformers call.

        Recomputation is always the non-reentrant kind, also when `use_reentrant=True` is passed: it gives the same gradients, and reaches
        adapters whose layer's input needs no gradient, where the reentrant kind gives none.
        """
        recompute = partial(gradient_checkpointing_func, use_reentrant=False) if enable else None
        self.vision_group = None
        for layers in (self._tower_layers(), list(self.language_model.model.layers)):
            self._keep(layers, None)
        self._set_checkpoints(recompute, recompute, every_n_layers)

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
            hidden = self._place(hidden, features, batch.visual_index)
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

    def _fill_embeddings(self, embeddings: Tensor, tiles: Tensor | None) -> Tensor:
        """Flat embeddings [T, H], the embedding of the image token replaced by the features of the tiles in order."""
        if tiles is None:
            return embeddings
        token = torch.tensor(self._image_token(), device=embeddings.device)
        image = self.language_model.model.embed_tokens(token).to(embeddings.dtype)
        index = (embeddings == image).all(-1).nonzero().squeeze(1)
        return self._place(embeddings, self.encode_tiles(tiles).flatten(0, 1), index)

    def _inv_freq(self, hidden: Tensor) -> Tensor:
        return self.language_model.model.inv_freq(hidden.device)

    # ---- transformers' conventions -----------------------------------------------------------------------------------------------

    @property
    def base_model(self) -> Any:
        """The model without its head, for callers that bring their own loss (TRL) or head (reward models)."""
        return Backbone(self)

    def _check_and_adjust_attn_implementation(self, attn_implementation: str | None, *args: Any, **kwargs: Any) -> str:
        """The kernel of the vision tower. Packed attention chooses its own (`attention_backend`), whatever name transformers passes."""
        if attn_implementation in VISION_KERNELS:
            return super()._check_and_adjust_attn_implementation(attn_implementation, *args, **kwargs)
        logger.warning(
            "attn_implementation=%r has no effect: Eagle chooses the attention kernel itself (model.attention_backend names one)",
            attn_implementation,
        )
        return "sdpa"

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.model.embed_tokens

    def set_input_embeddings(self, value: Any) -> None:
        self.language_model.model.embed_tokens = value

    def get_output_embeddings(self) -> nn.Module:
        return self.language_model.lm_head

    def set_output_embeddings(self, new_embeddings: Any) -> None:
        # Resizing makes a plain Linear; the head must stay one that can take its loss.
        head = Head(1, 1, bias=False, device="meta")
        head.weight = new_embeddings.weight
        head.out_features, head.in_features = head.weight.shape
        self.language_model.lm_head = head

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, config: Any = None, **kwargs: Any) -> Any:
        """As in transformers. A local folder that has no head is read as tied, whatever its configuration says."""
        if not isinstance(config, EagleConfig):
            hub = {key: kwargs[key] for key in HUB_OPTIONS if key in kwargs}
            config = EagleConfig.from_pretrained(pretrained_model_name_or_path if config is None else config, **hub)
        if not config.tie_word_embeddings and lacks_head(Path(pretrained_model_name_or_path, kwargs.get("subfolder") or "")):
            config.tie()
        return super().from_pretrained(pretrained_model_name_or_path, *args, config=config, **kwargs)

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """As in transformers; writes a model card where there is none, and files that the umask allows others to read."""
        super().save_pretrained(save_directory, *args, **kwargs)
        finish_folder(save_directory)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Random weights of one module, from the distributions of `eagle_model.initial`."""
        for name, draw in draws(self.config, module).items():
            draw.fill_(module.get_parameter(name))
        if isinstance(module, SiglipVisionEmbeddings):
            init.copy_(module.position_ids, torch.arange(module.position_ids.shape[-1]).expand((1, -1)))

    def _validate_model_kwargs(self, model_kwargs: dict[str, Any]) -> None:
        """Also refuses arguments of `generate` that transformers defines for models of other kinds."""
        super()._validate_model_kwargs(model_kwargs)  # type: ignore[misc]
        refuse_unknown(model_kwargs, signature(type(self).forward).parameters)

    def prepare_inputs_for_generation(  # type: ignore[override]  # releases of transformers have other parameters in other places
        self, input_ids: Any, *, inputs_embeds: Tensor | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """As in transformers, without what `forward` does not read.

        Arguments of the caller that `forward` does not know are refused before (`_validate_model_kwargs`). What is dropped here are
        arguments that `generate` itself adds, for models of other kinds.
        """
        inputs = super().prepare_inputs_for_generation(input_ids, inputs_embeds=inputs_embeds, **kwargs)  # type: ignore[misc]
        known = {*signature(type(self).forward).parameters, "output_attentions"}
        return {name: value for name, value in inputs.items() if name in known}

    def create_masks_for_generate(
        self, *, inputs_embeds: Tensor, attention_mask: Tensor | None, cache: Any = None, past_key_values: Any = None, **kwargs: Any
    ) -> Tensor:
        """The mask of one step of `generate` with a cache of fixed size, bool [B, 1, L, K]; transformers calls it."""
        cache = past_key_values if cache is None else cache
        batch, length = inputs_embeds.shape[:2]
        if attention_mask is None:
            attention_mask = torch.ones(batch, int(cache.get_seq_length()) + length, device=inputs_embeds.device)
        return cached_mask(attention_mask.bool(), length, cache)

    def _prefill(self, input_ids: Tensor, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """As in transformers; with `prefill_chunk_size` also for prompts with media, whose tiles are encoded in chunks too."""
        size, tiles = generation_config.prefill_chunk_size, model_kwargs.get("pixel_values")
        if size is None or tiles is None:
            return super()._prefill(input_ids, generation_config, model_kwargs, *args, **kwargs)  # type: ignore[misc]
        cache = model_kwargs.get("cache", model_kwargs.get("past_key_values"))
        return prefill_in_chunks(self, input_ids, tiles, size, model_kwargs.get("attention_mask"), cache)

    def get_compiled_call(self, compile_config: Any) -> Callable[..., Any]:
        """As in transformers, which calls it for decode steps with a cache of fixed size. The backend `cudagraphs` replays the step as one
        CUDA graph (`eagle_model.replay`) instead of compiling it.
        """
        if compile_config is not None and compile_config.backend == "cudagraphs":
            return ReplayedSteps(self)
        return super().get_compiled_call(compile_config)

    def _expand_inputs_for_generation(
        self, expand_size: int = 1, is_encoder_decoder: bool = False, input_ids: Any = None, **model_kwargs: Any
    ) -> tuple[Any, dict[str, Any]]:
        """Beams and several answers repeat every row; the tiles of a row repeat with it, as one block.

        Here is also the whole prompt, which `forward` may see in chunks: raises ValueError for a row without tokens.
        """
        mask = model_kwargs.get("attention_mask")
        if mask is not None and not (filled := mask.any(1)).all():
            raise ValueError(f"row {filled.int().argmin().item()} of the batch has no token")
        tiles = model_kwargs.pop("pixel_values", None)
        if tiles is not None and expand_size > 1:
            counts = (input_ids == self.config.image_token_index).sum(1) // self.tokens_per_tile
            blocks = tiles.split(counts.tolist())
            tiles = torch.cat([block for block in blocks for _ in range(expand_size)])
        input_ids, model_kwargs = super()._expand_inputs_for_generation(  # type: ignore[misc]
            expand_size, is_encoder_decoder, input_ids, **model_kwargs
        )
        if tiles is not None:
            model_kwargs["pixel_values"] = tiles
        return input_ids, model_kwargs


for auto in (AutoModelForImageTextToText, AutoModelForCausalLM):
    auto.register(EagleConfig, EagleForConditionalGeneration, exist_ok=True)
