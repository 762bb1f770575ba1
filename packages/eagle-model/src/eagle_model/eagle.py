"""Eagle 2.5: vision tower, pixel shuffle, connector and decoder, in two modes of one forward.

Packed (training): flat tensors, one pack, positions that restart with every sample, and a `Layout` that keeps samples apart.
Hugging Face (generation): padded batches and a key/value cache. Both run the same layers on flat hidden states.
"""

from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForImageTextToText, DynamicCache, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.models.siglip.modeling_siglip import SiglipVisionEmbeddings
from transformers.utils.generic import ModelOutput

from eagle_cp import Layout, TilePlan, exchange_tiles
from eagle_kernels import offload_checkpoint
from eagle_model.checkpoint import HEAD, lacks_head
from eagle_model.configuration import EagleConfig
from eagle_model.decoder import AttentionContext, DecoderLayer, Head, LanguageModel, Norm
from eagle_model.vision import VisionModel, VisionTower, make_connector, pixel_shuffle

IGNORE_INDEX = -100
#: What transformers passes to every model and this one has no use for, with the values that change nothing.
IGNORED_ARGUMENTS = {"return_dict": (True,), "output_attentions": (False,), "output_hidden_states": (False,)}
HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")


@dataclass
class EagleOutput(ModelOutput):
    """loss: 0-dim float32, when targets or labels were given. logits: [T, V] packed, [B, L, V] otherwise. past_key_values: the cache."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: Any = None


class EagleForConditionalGeneration(PreTrainedModel, GenerationMixin):
    """The model; its tensors have the names of the released checkpoints.

    Every decoder layer (`language_model.model.layers`) and vision layer (`vision_model.vision_model.encoder.layers`) is a module that is
    called through `forward` and owns its parameters, so each can be wrapped (FSDP2) by itself.
    """

    config_class = EagleConfig
    config: EagleConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    input_modalities = ["image", "text"]  # noqa: RUF012
    _no_split_modules = ["DecoderLayer", "SiglipEncoderLayer"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_attention_backend = False
    _tied_weights_keys = {HEAD: "language_model.model.embed_tokens.weight"}  # noqa: RUF012
    _keys_to_ignore_on_load_unexpected = [r"^vision_model\.vision_model\.head\."]  # noqa: RUF012

    def __init__(self, config: EagleConfig) -> None:
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
        self.post_init()

    # ---- parts -------------------------------------------------------------------------------------------------------------------

    @property
    def tokens_per_tile(self) -> int:
        """`k`: image tokens of one tile."""
        return self.config.tokens_per_tile

    def image_features(self, tiles: Tensor) -> Tensor:
        """Tokens of tiles: uint8 [N, s, s, 3] or normalised float [N, 3, s, s] -> [N, k, H].

        With no tiles (N = 0) the tower still runs, on one black tile whose features are cut away: every rank takes part in the
        collectives of sharded parameters, and the tower's gradients exist and are zero.
        """
        real = tiles.shape[0]
        if real == 0:
            tiles = tiles.new_zeros(1, *tiles.shape[1:])
        hidden = self.vision_model(tiles)
        if self.config.use_pixel_shuffle:
            side = round(hidden.shape[1] ** 0.5)
            hidden = pixel_shuffle(hidden.unflatten(1, (side, side)), self.config.downsample_ratio).flatten(1, 2)
        return self.mlp1(hidden)[:real]

    def embed(
        self,
        input_ids: Tensor,
        tiles: Tensor | None,
        context_index: Tensor | None = None,
        layout: Layout | None = None,
        tile_plan: TilePlan | None = None,
    ) -> Tensor:
        """Embeddings [T, H] of flat ids [T], image tokens replaced by the features of the tiles in order.

        context_index: int64 [n], where the image tokens stand; found by looking (which waits for the device) when not given.
        layout, tile_plan: with several context ranks, `tiles` are this rank's share of the plan (`eagle_cp.plan_tiles`), and features are
        sent to the ranks that hold their tokens.
        Raises ValueError when the number of image tokens isn't that of the features.
        """
        hidden = self.language_model.model.embed_tokens(input_ids)
        if tiles is None:
            return hidden
        features = self.image_features(tiles).flatten(0, 1)
        if layout is not None and layout.mesh.size > 1:
            if tile_plan is None:
                raise ValueError("several context ranks need a tile_plan for their tiles; pass tile_plan=eagle_cp.plan_tiles(layout, ...)")
            features = exchange_tiles(features, layout, tile_plan)
            context_index = tile_plan.local_rows.to(hidden.device, non_blocking=True)
        if context_index is None:
            if self.config.image_token_index is None:
                raise ValueError("config.image_token_index isn't set; take it from the tokenizer: convert_tokens_to_ids('<IMG_CONTEXT>')")
            context_index = (input_ids == self.config.image_token_index).nonzero().squeeze(1)
        if context_index.shape[0] != features.shape[0]:
            raise ValueError(
                f"{context_index.shape[0]} image tokens in input_ids, but {tiles.shape[0]} tiles of {self.tokens_per_tile} tokens give "
                f"{features.shape[0]}; the prompt and the tiles must come from the same processor settings"
            )
        return hidden.index_copy(0, context_index, features.to(hidden.dtype))

    def set_activation_checkpointing(self, mode: str, engine: Any = None) -> None:
        """What backward finds of the layers' activations: `none` keeps all, `full` rebuilds every layer from its input, `offload` also
        keeps the inputs of decoder layers in host memory (`engine`: an `eagle_kernels.OffloadEngine`)."""
        if mode not in ("none", "full", "offload"):
            raise ValueError(f"activation checkpointing mode {mode!r}; it must be 'none', 'full' or 'offload'")
        # Nothing in the model draws random numbers (dropout is refused), so their state needn't be kept.
        full = None if mode == "none" else partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
        decoder = partial(offload_checkpoint, engine=engine) if mode == "offload" else full
        for module in self.modules():
            if isinstance(module, VisionTower):
                module.checkpoint = full
            elif isinstance(module, DecoderLayer):
                module.checkpoint = decoder

    # ---- forward -----------------------------------------------------------------------------------------------------------------

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        past_key_values: Any = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        *,
        layout: Layout | None = None,
        tiles: Tensor | None = None,
        context_index: Tensor | None = None,
        targets: Tensor | None = None,
        token_weights: Tensor | None = None,
        denominator: Tensor | None = None,
        num_kept: int | None = None,
        tile_plan: TilePlan | None = None,
        **kwargs: Any,
    ) -> EagleOutput:
        """Packed mode (with `layout`) or Hugging Face mode.

        Packed: input_ids, position_ids [T]; layout: which tokens belong together; tiles: uint8 [N, s, s, 3] (N may be 0, see
        `image_features`) or None, which leaves the tower out; context_index: int64 [n], positions of the image tokens; targets: [T], the
        id expected after each position, -100 ignored; token_weights: float32 [T]; denominator: 0-dim; num_kept: count of rows that carry
        loss, if known on the host. Gives the loss, or logits [T, V] without targets. With several context ranks all of these are the
        rank's own (`layout.shard`; tiles by `tile_plan`, from `eagle_cp.plan_tiles`), and losses and gradients of the ranks add up.

        Hugging Face: input_ids [B, L]; attention_mask [B, L] (with a cache: over cached and new tokens), padding on either side;
        pixel_values: uint8 tiles [N, s, s, 3] or normalised float [N, 3, s, s]; labels [B, L], not shifted; logits_to_keep: only the last
        so many positions (0: all). Gives logits, the loss (mean over labels) with labels, and the cache with use_cache.
        """
        kwargs.pop("cache_position", None)
        unknown = {name: value for name, value in kwargs.items() if value is not None and value not in IGNORED_ARGUMENTS.get(name, ())}
        if unknown:
            raise TypeError(f"forward has no argument {', '.join(sorted(unknown))}; it gives an EagleOutput: loss, logits, past_key_values")
        if layout is not None:
            if position_ids is None:
                raise ValueError("packed forward needs position_ids [T], which restart with every sample")
            hidden = self.embed(input_ids, tiles, context_index, layout, tile_plan)
            context = AttentionContext(position_ids, self._inv_freq(hidden), layout, backend=self.attention_backend)
            hidden = self.language_model.model(hidden, context)
            head = self.language_model.lm_head
            if targets is None:
                return EagleOutput(logits=head(hidden))
            loss = head(hidden, targets, token_weights=token_weights, denominator=denominator, num_kept=num_kept)
            return EagleOutput(loss=loss)
        if tiles is not None:
            pixel_values = tiles
        return self._forward_batch(
            input_ids, attention_mask, position_ids, pixel_values, past_key_values, labels, use_cache, logits_to_keep
        )

    def _forward_batch(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        pixel_values: Tensor | None,
        cache: Any,
        labels: Tensor | None,
        use_cache: bool | None,
        logits_to_keep: int,
    ) -> EagleOutput:
        if getattr(cache, "is_compileable", False):
            raise ValueError(
                f"the cache is a {type(cache).__name__}, of fixed size; this model's must grow with the answer: "
                "leave cache_implementation out or set it to 'dynamic'"
            )
        batch, length = input_ids.shape
        past = cache.get_seq_length() if cache is not None else 0
        if attention_mask is None:
            attention_mask = input_ids.new_ones(batch, past + length)
        if attention_mask.shape != (batch, past + length):
            raise ValueError(
                f"attention_mask is {tuple(attention_mask.shape)}, expected {(batch, past + length)}: {past} cached and {length} new tokens"
            )
        seen = attention_mask.bool()
        if position_ids is None:
            position_ids = (seen.long().cumsum(1) - 1).clamp_min(0)[:, past:]
        if use_cache and cache is None:
            cache = DynamicCache()
        counts = [] if past else seen.sum(1).tolist()
        if 0 in counts and cache is None:
            raise ValueError(f"row {counts.index(0)} of the batch has no token")
        # After a cache all new tokens run, padding or not: nothing has to be known on the host between two tokens of an answer. So does
        # the first chunk of a prompt in chunks, if some row's tokens only begin in a later one.
        whole = past > 0 or 0 in counts
        rows = torch.arange(batch * length, device=seen.device) if whole else seen.flatten().nonzero().squeeze(1)
        hidden = self.embed(input_ids.flatten()[rows], pixel_values)
        context = AttentionContext(
            position_ids.expand(batch, length).flatten()[rows], self._inv_freq(hidden), cache=cache, rows=rows, shape=(batch, length)
        )
        if whole:
            # New token i of a row sees the cached tokens and the new ones up to itself, as far as they aren't padding. Padding sees at
            # least itself, for a softmax over nothing isn't a number.
            order = torch.arange(past + length, device=seen.device)
            new = order[past:, None]
            context.mask = ((seen[:, None, :] & (order <= new)) | (order == new))[:, None]
        else:
            context.layout = Layout.single([0, *accumulate(counts)])
        hidden = self.language_model.model(hidden, context)

        head = self.language_model.lm_head
        padded = hidden.new_zeros(batch * length, hidden.shape[-1]).index_copy(0, rows, hidden).view(batch, length, -1)
        logits = head(padded[:, -logits_to_keep:] if logits_to_keep else padded)
        loss = None
        if labels is not None:
            targets = torch.full_like(labels, IGNORE_INDEX)
            targets[:, :-1] = labels[:, 1:]
            loss = head(hidden, targets.flatten()[rows])
        return EagleOutput(loss=loss, logits=logits, past_key_values=cache if use_cache else None)

    def _inv_freq(self, hidden: Tensor) -> Tensor:
        return self.language_model.model.inv_freq(hidden.device)

    # ---- transformers' conventions -----------------------------------------------------------------------------------------------

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

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """SigLIP's own scheme for the tower (Xavier), normal with `initializer_range` for the rest, ones for norms."""
        if isinstance(module, SiglipVisionEmbeddings):
            init.normal_(module.position_embedding.weight, std=self.config.vision_config.hidden_size**-0.5)
            init.copy_(module.position_ids, torch.arange(module.position_ids.shape[-1]).expand((1, -1)))
        elif isinstance(module, nn.Conv2d):
            own = self.config.patch_initializer_range
            init.lecun_normal_(module.weight) if own is None else init.normal_(module.weight, std=own)
        elif getattr(module, "xavier", False):
            init.xavier_uniform_(module.weight)  # type: ignore[arg-type]
        elif isinstance(module, nn.Linear | nn.Embedding):
            own = self.config.initializer_range
            init.normal_(module.weight, std=self.config.text_config.initializer_range if own is None else own)
        elif isinstance(module, nn.LayerNorm | Norm):
            init.ones_(module.weight)
        if isinstance(bias := getattr(module, "bias", None), nn.Parameter):
            init.zeros_(bias)

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


AutoModelForImageTextToText.register(EagleConfig, EagleForConditionalGeneration, exist_ok=True)
