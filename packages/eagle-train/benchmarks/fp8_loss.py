"""Loss curves of a small model whose linear layers multiply 8-bit floats, next to bfloat16: several seeds, the same batches.

    OMP_NUM_THREADS=1 python fp8_loss.py --out results/fp8.json

Model, data and steps are those of `low_memory.py` (AdamW, float32 weights, computation in bfloat16); all linear layers of the decoder are
rounded, not its head. A CPU multiplies the rounded values in bfloat16 and adds them in float32; a GPU's tensor cores add 8-bit products
with fewer bits where `fast` sums are used.
"""

import argparse

from low_memory import compare, small_model, stage_of, train

from eagle_model.lora import use_float8
from eagle_train.training.optim import make_optimizer

CONTENDERS = ("bf16", "rowwise", "rowwise_with_gw_hp")


def run(name: str, seed: int, options: argparse.Namespace) -> list[float]:
    model = small_model(seed)
    if name != "bf16":
        use_float8(model, "language", name)  # pyright: ignore[reportArgumentType]
    stage = stage_of("adamw", options)
    return train(model, make_optimizer(model, stage), stage, seed, options.steps)


if __name__ == "__main__":
    compare(__doc__, CONTENDERS, run)
