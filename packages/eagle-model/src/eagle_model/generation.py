"""What the model gives to transformers' `generate`: its inputs and masks of a step, prompts in chunks."""

from inspect import signature
from typing import Any, cast

import torch
from torch import Tensor
from transformers import GenerationMixin

from eagle_model.padded import cached_mask, refuse_unknown
from eagle_model.prefill import prefill_in_chunks


class EagleGenerationMixin(GenerationMixin):
    """Methods that `generate` calls, of a model with tiles next to the tokens of a prompt.

    Transformers wants it after `PreTrainedModel` among the bases of a model, so it overrides methods of `GenerationMixin` alone.
    """

    config: Any

    def _validate_model_kwargs(self, model_kwargs: dict[str, Any]) -> None:
        """Also refuses arguments of `generate` that transformers defines for models of other kinds."""
        super()._validate_model_kwargs(model_kwargs)  # type: ignore[misc]
        refuse_unknown(model_kwargs, self._parameters_of_forward())

    def _parameters_of_forward(self) -> Any:
        model: Any = type(self)
        return signature(model.forward).parameters

    def prepare_inputs_for_generation(  # type: ignore[override]  # releases of transformers have other parameters in other places
        self, input_ids: Any, *, inputs_embeds: Tensor | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """As in transformers, without what `forward` does not read.

        Arguments of the caller that `forward` does not know are refused before (`_validate_model_kwargs`). What is dropped here are
        arguments that `generate` itself adds, for models of other kinds.
        """
        inputs = super().prepare_inputs_for_generation(input_ids, inputs_embeds=inputs_embeds, **kwargs)  # type: ignore[misc]
        known = {*self._parameters_of_forward(), "output_attentions"}
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
        return prefill_in_chunks(cast(Any, self), input_ids, tiles, size, model_kwargs.get("attention_mask"), cache)

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
            counts = (input_ids == self.config.image_token_index).sum(1) // cast(Any, self).tokens_per_tile
            blocks = tiles.split(counts.tolist())
            tiles = torch.cat([block for block in blocks for _ in range(expand_size)])
        input_ids, model_kwargs = super()._expand_inputs_for_generation(  # type: ignore[misc]
            expand_size, is_encoder_decoder, input_ids, **model_kwargs
        )
        if tiles is not None:
            model_kwargs["pixel_values"] = tiles
        return input_ids, model_kwargs
