"""Prints a table and stores it, with date and versions, in results/."""

from __future__ import annotations

import json
import platform
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import PIL


def write(name: str, title: str, table: str, figures: Any, *, save: bool, **more: str) -> None:
    where = {
        "date": datetime.now(UTC).date().isoformat(),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "pillow": PIL.__version__,
        "machine": f"{platform.machine()}, one core",
        **more,
    }
    print(table)
    if save:
        folder = Path(__file__).parent / "results"
        folder.mkdir(exist_ok=True)
        (folder / f"{name}.json").write_text(json.dumps({**where, "figures": figures}, indent=1) + "\n")
        head = ", ".join(f"{key} {value}" for key, value in where.items())
        (folder / f"{name}.md").write_text(f"# {title}\n\n{head}\n\n{table}\n")
