"""Runs the groups asked for (all by default) and writes results as JSON, Markdown and a plot.

python -m benchmarks [norms rope swiglu gelu head] [--out DIR]
"""

import argparse
import datetime
import importlib.metadata
import json
import traceback
from pathlib import Path

import torch

from benchmarks.operators import GROUPS
from benchmarks.report import markdown, plot
from benchmarks.timing import copy_bandwidth, interleaved_ms, matmul

LIBRARIES = ("torch", "triton", "liger-kernel", "quack-kernels", "cut-cross-entropy")


def installed(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("groups", nargs="*", default=list(GROUPS), help=f"of {', '.join(GROUPS)}")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()

    torch.manual_seed(0)
    bandwidth = copy_bandwidth()
    product, operations = matmul()
    rate = operations / interleaved_ms({"matmul": product}, batch=40.0)["matmul"] * 1e3
    result = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "gpu": torch.cuda.get_device_name(),
        "versions": {name: installed(name) for name in LIBRARIES},
        "copy_tb_per_s": bandwidth / 1e12,
        "matmul_tflops": rate / 1e12,
        "rows": [],
        "failures": [],
    }
    for name in options.groups:
        try:
            result["rows"] += GROUPS[name](bandwidth, result["failures"])
        except Exception:
            result["failures"].append(f"{name}: {traceback.format_exc()[-1500:]}")
        torch.cuda.empty_cache()
    options.out.mkdir(parents=True, exist_ok=True)
    stem = options.out / f"operators-{result['date']}"
    stem.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    text = markdown(result)
    stem.with_suffix(".md").write_text(text)
    plot(result, stem.with_suffix(".png"))
    print(text)


if __name__ == "__main__":
    main()
