"""The functions of `eagle_train`, called by a program as the documentation shows it."""

import os
import re
import subprocess
import sys
from pathlib import Path

from eagle_train.config import dump_config

PAGE = Path(__file__).parents[2] / "docs" / "getting-started.md"


def run_program(folder, text):
    (folder / "program.py").write_text(text)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run([sys.executable, "program.py"], capture_output=True, text=True, cwd=folder, env=environment, timeout=280)


def test_the_program_of_getting_started(colour_run, tmp_path):
    """Its reading processes import the program; without the line with `__main__` each of them trained."""
    [program] = re.findall(r"```py\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    sources = {"rows": {"annotation": "rows.jsonl"}}
    config = colour_run(data={"sources": sources, "eval_sources": sources, "workers": 1}, loader={"workers": 1})
    (tmp_path / "run.yaml").write_text(dump_config(config))
    done = run_program(tmp_path, program)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "my-model" / "config.json").is_file()

    unguarded = program.replace('if __name__ == "__main__":', "if True:")
    assert unguarded != program
    (tmp_path / "run.yaml").write_text(dump_config(config.replaced(run=config.run.replaced(name="again"))))
    failed = run_program(tmp_path, unguarded)
    assert failed.returncode == 1
    assert 'one that calls eagle_train needs if __name__ == "__main__": around the calls' in failed.stderr.splitlines()[-1]
