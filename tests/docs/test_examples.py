"""Every folder of examples/ runs as its README or its docstring says, on a CPU, and prints what it promises."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
TIME_LIMIT = 240
"""Seconds. On two idle cores each example takes less than 30; a machine that runs other tests next to it needs more."""


def run(command: list[str], folder: Path) -> str:
    """The output of a command that must succeed; the environment's `eagle` and `python` come first in PATH."""
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=TIME_LIMIT
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def test_every_example_is_tested_and_listed():
    folders = {path.name for path in EXAMPLES.iterdir() if path.is_dir() and not path.name.startswith("__")}
    assert folders == {"sft_own_jsonl", "siglip_plus_language_model", "context_parallel_in_hf", "tiles_in_another_pipeline"}
    listed = set(re.findall(r"\]\((\w+)/", (EXAMPLES / "README.md").read_text()))
    assert listed == folders


def test_tiles_in_another_pipeline(tmp_path):
    output = run([sys.executable, str(EXAMPLES / "tiles_in_another_pipeline" / "main.py")], tmp_path)
    assert "640 x 480: 7 crops, 1008 visual tokens" in output
    assert "10000 images in" in output


def test_context_parallel_in_hf(tmp_path):
    output = run([sys.executable, str(EXAMPLES / "context_parallel_in_hf" / "main.py")], tmp_path)
    two, one = (re.search(rf"{name}: +(loss [\d.]+), gradient norm ([\d.]+)", output) for name in ("two ranks", "one process"))
    assert two[1] == one[1]
    assert float(two[2]) == pytest.approx(float(one[2]), rel=1e-9)


def test_siglip_plus_language_model(tmp_path):
    output = run([sys.executable, str(EXAMPLES / "siglip_plus_language_model" / "main.py"), str(tmp_path)], tmp_path)
    first, last = (float(number) for number in re.search(r"loss ([\d.]+) -> ([\d.]+)", output).groups())
    assert last < 0.5 < first
    assert [f"{name}: {name}" in output for name in ("red", "green", "blue")] == [True] * 3
    assert (tmp_path / "eagle" / "model.safetensors").is_file()


@pytest.mark.slow
def test_sft_own_jsonl(tmp_path):
    for path in (EXAMPLES / "sft_own_jsonl").glob("*.*"):
        shutil.copy(path, tmp_path)
    blocks = re.findall(r"^```bash\n(.*?)^```", (tmp_path / "README.md").read_text(), flags=re.DOTALL | re.MULTILINE)
    output = run(["bash", "-e", "-c", "\n".join(blocks)], tmp_path)
    assert '"line": 4, "reason": "media-missing"' in output  # the ledger, as printed
    assert "short  step 1/40" in output
    assert "60 rows: 59 planned, 1 unusable" in output
    assert re.search(r"answer: (red|green|blue|yellow)", output)
    assert (tmp_path / "exported" / "model.safetensors").is_file()
    run_folder_is_as_documented(tmp_path / "runs" / "my-run")


def documented_keys(page: str, heading: str) -> set[str]:
    """Names in the first column of the first table after a line of docs/run-folder.md that contains `heading`."""
    table = re.search(r"^(\|.*?)\n\n", page[page.index(heading) :], flags=re.DOTALL | re.MULTILINE)[1]
    return {name for row in table.splitlines()[2:] for name in re.findall(r"`(\w+)`", row.split("|")[1])}


def run_folder_is_as_documented(folder: Path) -> None:
    page = (ROOT / "docs" / "run-folder.md").read_text()
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps, evaluations = ([record for record in records if record["kind"] == kind] for kind in ("step", "eval"))
    assert len(steps) == 60
    assert len(evaluations) == 2
    sometimes = {"losses", "mfu", "memory_planned", "start"}  # with several sources, on a GPU, of the first step
    assert {frozenset(record) - {"kind"} | sometimes for record in steps} == {frozenset(documented_keys(page, "`kind` = `step`"))}
    assert {frozenset(record) - {"kind"} for record in evaluations} == {frozenset(documented_keys(page, "`kind` = `eval`"))}
    [entry] = [json.loads(line) for line in (folder / "ledger.jsonl").read_text().splitlines()]
    assert documented_keys(page, "## Ledger") == set(entry) | {"step"}
    answers = [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]
    elsewhere = {"frames", "max_tokens", "value", "text_only_value"}  # of sweeps, and of metrics that compare more than text
    assert {frozenset(answer) | elsewhere for answer in answers} == {frozenset(documented_keys(page, "## Answers"))}
