"""Where and with what a result was measured."""

import datetime
import importlib.metadata
import os
import platform
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Environment:
    """date: ISO 8601 (UTC); load: load average of the last minute; gpus: number of GPUs in use; versions: None where not installed."""

    date: str
    python: str
    machine: str
    cores: int
    load: float
    gpu: str | None = None
    gpus: int = 0
    versions: dict[str, str | None] = field(default_factory=dict)

    def __str__(self) -> str:
        gpu = f", {self.gpus} x {self.gpu}" if self.gpu else ""
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items() if version)
        machine = f"{self.machine}, {self.cores} cores, load {self.load:.1f}{gpu}"
        return f"{self.date}; {machine}; Python {self.python}{', ' if versions else ''}{versions}."


def environment(packages: Iterable[str], *, gpus: int = 1) -> Environment:
    """The environment of this process. packages: distributions whose versions are recorded; gpus: GPUs that the benchmark uses, if any.

    torch is not imported here: a process without it uses no GPU.
    """
    torch = sys.modules.get("torch")
    gpu = torch.cuda.get_device_name() if torch is not None and torch.cuda.is_available() else None
    return Environment(
        date=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        python=platform.python_version(),
        machine=platform.machine(),
        cores=os.cpu_count() or 0,
        load=os.getloadavg()[0],
        gpu=gpu,
        gpus=gpus if gpu else 0,
        versions={name: version(name) for name in packages},
    )


def version(package: str) -> str | None:
    """Version of an installed distribution, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
