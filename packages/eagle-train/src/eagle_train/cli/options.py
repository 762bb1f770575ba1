"""Options that several verbs share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG", help="Configuration (YAML); eagle init writes one.", show_default=False)]
RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="Run folder, for example runs/quickstart.", show_default=False)]
ModelFolder = Annotated[
    Path, typer.Argument(metavar="FOLDER", help="Run folder, or the folder of an exported or released model.", show_default=False)
]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", help="Change one value: --set stages.0.lr=1e-5. May be repeated.", metavar="KEY=VALUE"),
]
Checkpoint = Annotated[
    str | None,
    typer.Option(help="Checkpoint of the run by name, or its folder; default: the newest.", metavar="NAME", show_default=False),
]
ShowDefaults = Annotated[bool, typer.Option("--show-defaults", help="Also print every value that the file does not set.")]
Device = Annotated[
    str | None,
    typer.Option(
        help="cpu or cuda; default: a GPU when there is one.", metavar="DEVICE", show_default=False, autocompletion=lambda: ["cpu", "cuda"]
    ),
]
Processes = Annotated[
    int | None,
    typer.Option(
        "--nproc", min=1, help="Processes on this machine; default: one per visible GPU, else 1.", metavar="N", show_default=False
    ),
]
Executor = Annotated[
    str | None,
    typer.Option(
        help="local (processes) or ray (RAY_ADDRESS names a cluster); default: as configured.", metavar="NAME", show_default=False
    ),
]


def with_executor(overrides: list[str] | None, executor: str | None, key: str) -> list[str]:
    """The overrides of `--set`, with that of `--executor`."""
    return [*(overrides or ()), *(() if executor is None else (f"{key}={executor}",))]
