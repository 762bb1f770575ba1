"""The scripts of all packages: their imports exist, and those that need no GPU write a valid result at small sizes."""

import ast
import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.compare import main
from benchmarks.results import read

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted(ROOT.glob("packages/*/benchmarks/*.py"))
PARTS = sorted(ROOT.glob("packages/*/benchmarks/*/*.py"))


@pytest.mark.parametrize("path", SCRIPTS + PARTS, ids=lambda path: path.relative_to(ROOT / "packages").as_posix())
def test_imports_exist(path):
    """Names that a script imports from the packages or the harness. A rename must not break a script that only runs on a GPU."""
    pytest.importorskip("triton")
    imports = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom) and node.level == 0]
    for node in imports:
        assert node.module is not None
        if node.module.split(".")[0].startswith(("eagle_", "benchmarks")):
            module = importlib.import_module(node.module)
            for alias in node.names:
                if not hasattr(module, alias.name):
                    importlib.import_module(f"{node.module}.{alias.name}")


def test_there_are_scripts_of_every_package():
    assert {path.parts[-3] for path in SCRIPTS} == {f"eagle-{name}" for name in ("cp", "kernels", "model", "sampling", "tiling", "train")}


@pytest.mark.parametrize(
    ("script", "options", "case"),
    [
        ("eagle-tiling/benchmarks/grid.py", ["--sizes", "2000"], "select_grids, max_tiles 12"),
        ("eagle-kernels/benchmarks/float8.py", ["--small"], "k_proj, 224 -> 32, outliers, fp8 rowwise"),
        ("eagle-model/benchmarks/generation.py", ["--small", "--only", "131k", "2k-16", "--steps", "plain", "graph"], "131k"),
        ("eagle-sampling/benchmarks/budget.py", ["--rows", "2000"], "plan_many, ads, L_max 32768"),
        ("eagle-train/benchmarks/planning.py", ["1000"], "visual plan, 32768 tokens"),
        ("eagle-train/benchmarks/optimizers.py", ["--small"], "adamw, bfloat16 weights, 0.00 B parameters"),
        (
            "eagle-train/benchmarks/step.py",
            ["--small", "--only", "questions", "--rival", "--rounds", "1"],
            "7 questions, 64 visual tokens, one row",
        ),
    ],
)
def test_a_script_writes_its_result(script, options, case, tmp_path, capsys):
    out = tmp_path / "result.json"
    command = [sys.executable, str(ROOT / "packages" / script), *options, "--out", str(out)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    result = read(out)
    assert result.benchmark == f"{script.split('/')[0]}/{Path(script).stem}"
    assert case in {found.case for found in result.cases}
    assert done.stdout.strip().endswith(out.with_suffix(".md").read_text().strip())
    assert main([str(out), str(out)]) == 0
    capsys.readouterr()
