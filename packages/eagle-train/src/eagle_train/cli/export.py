"""`eagle export`: the weights of a run as a checkpoint that other programs load."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from .app import app
from .options import Checkpoint, RunFolder

DTYPES = ["bfloat16", "float16", "float32"]


@app.command()
def export(
    run: RunFolder,
    output: Annotated[Path, typer.Argument(metavar="OUTPUT", help="Folder to write.", show_default=False)],
    checkpoint: Checkpoint = None,
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32.", metavar="DTYPE", autocompletion=lambda: DTYPES)] = "bfloat16",
    vllm: Annotated[bool, typer.Option("--vllm", help="Also write vllm.yaml, options for vllm serve.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Write into a folder that is not empty.")] = False,
    adapter: Annotated[bool, typer.Option("--adapter", help="Write the LoRA adapters alone, in PEFT's format.")] = False,
    ema: Annotated[bool, typer.Option("--ema", help="Write the moving average of the weights (model.ema).")] = False,
) -> None:
    """Write a run's weights in the layout of Eagle 2.5.

    The layout is that of the released checkpoints. LoRA adapters are merged into the weights.
    """
    from eagle_train.config import ConfigError

    if dtype not in DTYPES:
        raise ConfigError(f"--dtype {dtype}: expected bfloat16, float16 or float32")
    if output.exists() and not (output.is_dir() and (force or not any(output.iterdir()))):
        raise ConfigError(f"{output} exists and is not an empty folder; name another one, or add --force to write into that folder")
    from .progress import quiet

    quiet()
    from eagle_train.runs.export import export as run_export
    from eagle_train.runs.export import export_adapter
    from eagle_train.runs.folder import open_run
    from eagle_train.training.checkpoint import find_checkpoint

    config = open_run(run)
    path = find_checkpoint(config.run.folder / "checkpoints", checkpoint) if checkpoint is not None else None
    write = export_adapter if adapter else run_export
    done = write(config, output, checkpoint_path=path, dtype=dtype, ema=ema)
    print(f"wrote {output} (stage {done['from']['stage_name']}, step {done['from']['step']})")
    if vllm:
        from eagle_train.runs.serve import write_options

        named, options = (shlex.quote(str(path)) for path in (output, write_options(output)))
        print(f"serve it: eagle serve {named}, or: vllm serve {named} --config {options}")
