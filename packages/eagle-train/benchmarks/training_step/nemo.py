"""The same training step by NeMo AutoModel (0.7.0 needs transformers 5.18 and at most triton 3.8), on one GPU.

Its model of transformers' InternVL with Liger's operators, its activation checkpointing, and its loss of logits in float32, which gets the
rows with labels: its fused loss needs a cut-cross-entropy that is not on PyPI. `full` computes every layer again, with flash-attn-4 in the
decoder as in `rival.py`; `selective` keeps the results of every second product and of torch's attention, which it uses because others are
not kept. Next to this suite `pip install --no-deps nemo-automodel==0.7.0 transformers==5.18.0` and Liger are enough.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from eagle_model import PackedBatch

from .rival import Public, internvl, labelled, register_attention


def make(config: Any, *, policy: str, plain: bool = False) -> Any:
    """The model with the sizes of `config`, on the default device, in the default dtype. plain: without Liger and flash-attn-4.

    Raises ImportError where a package is missing.
    """
    import torch.distributed as dist
    from nemo_automodel import NeMoAutoModelForImageTextToText
    from nemo_automodel.components.distributed.config import DDPConfig
    from nemo_automodel.components.distributed.ddp import parallelize_ddp

    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    attention = "sdpa" if plain or policy == "selective" else register_attention()
    options = {"use_liger_kernel": not plain, "attn_implementation": "sdpa", "dtype": torch.get_default_dtype()}
    model = NeMoAutoModelForImageTextToText.from_config(internvl(config), **options).train()
    model.config.text_config._attn_implementation = attention
    settings = DDPConfig(activation_checkpointing=True if policy == "full" else policy)
    return parallelize_ddp(model, settings, device=torch.get_default_device())


def loss(model: Any, pack: PackedBatch, *, plain: bool = False) -> Tensor:
    """Mean loss of the rows with labels."""
    rows, targets = labelled(model, pack)
    if plain:
        return torch.nn.functional.cross_entropy(model.lm_head(rows).float(), targets)
    from nemo_automodel.components.loss.masked_ce import MaskedCrossEntropy

    return MaskedCrossEntropy()(model.lm_head(rows)[None], targets[None], num_label_tokens=len(targets))


NEMO = {f"nemo-{policy}": Public(f"NeMo AutoModel, {policy}", partial(make, policy=policy), loss) for policy in ("full", "selective")}
