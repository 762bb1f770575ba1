"""`eagle plan`: no torch, columns that are explained, warnings, parameters and memory."""

import re
import subprocess
import sys

from eagle_train.cli.tables import PLAN_COLUMNS, PLAN_LEGEND
from eagle_train.config import dump_config

PLAN_WITHOUT_TORCH = """
import sys
from eagle_train.cli.main import main
try:
    main(["plan", sys.argv[1]])
except SystemExit as ended:
    assert not ended.code, ended.code
assert "torch" not in sys.modules or sys.argv[2] == "torch"
"""

# In transformers 5.17 the class imports torch by itself (for GGUF); in the locked release it does not, and plan must not.
TOKENIZER_ALONE = "import sys; from transformers import PreTrainedTokenizerFast; print('torch' if 'torch' in sys.modules else 'nothing')"


def test_plan_never_imports_torch_and_explains_its_columns(colour_run, tmp_path):
    config = colour_run(model={"preset": "tiny", "tokenizer": "tokenizer"})
    (tmp_path / "run.yaml").write_text(dump_config(config))
    alone = subprocess.run([sys.executable, "-c", TOKENIZER_ALONE], capture_output=True, text=True, timeout=100, check=True).stdout.strip()
    command = [sys.executable, "-c", PLAN_WITHOUT_TORCH, tmp_path / "run.yaml", alone]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert "25 rows: 25 planned" in done.stdout
    header = done.stdout.splitlines()[0].split()
    assert tuple(header) == PLAN_COLUMNS
    for column in ("L_max", "rows", "samples", "dropped", "fill", "longest", "labels", "steps"):
        assert f"{column}:" in PLAN_LEGEND
        assert column in header


def test_plan_counts_samples_with_repetitions(colour_run, tmp_path, eagle_here):
    config = colour_run(data={"sources": {"rows": {"annotation": "rows.jsonl", "repeat_time": 3}}, "workers": 1})
    (tmp_path / "run.yaml").write_text(dump_config(config))
    lines = eagle_here("plan", tmp_path / "run.yaml").stdout.splitlines()
    row = dict(zip(PLAN_COLUMNS, lines[1].split()))
    assert (row["rows"], row["samples"]) == ("25", "75")


def test_plan_warns_of_samples_beyond_the_positions_of_the_model(colour_run, tmp_path, eagle_here):
    config = colour_run()
    overrides = dict(config.model.overrides) | {"text_config": {**config.model.overrides["text_config"], "max_position_embeddings": 200}}
    (tmp_path / "run.yaml").write_text(dump_config(config.replaced(model=config.model.replaced(overrides=overrides))))
    planned = eagle_here("plan", tmp_path / "run.yaml").stdout
    assert re.search(r"warning: stage one: 1 row longer than the 200 positions of the model", planned), planned
    (tmp_path / "fits.yaml").write_text(dump_config(config))
    assert "warning" not in eagle_here("plan", tmp_path / "fits.yaml").stdout


def test_plan_prints_parameters_and_memory_of_each_gpu(colour_run, tmp_path, eagle_here):
    from eagle_train.runs.ready import get_ready
    from eagle_train.runs.resources import for_gpus, resources
    from eagle_train.training.build import build_model
    from eagle_train.training.model import model_config
    from eagle_train.training.step_memory import planned

    config = colour_run(parallel={"ulysses": 2})
    ready = get_ready(config)
    needed = resources(ready, 4)
    assert needed.parameters == sum(parameter.numel() for parameter in build_model(config, ready.tokenizer).parameters())
    described = model_config(config, ready.tokenizer)
    assert (needed.dtype, needed.activations, needed.tokens) == ("bfloat16", "selective", 640)
    assert needed.memory.gpu == planned(for_gpus(config), described, 4).gpu
    (tmp_path / "run.yaml").write_text(dump_config(config))
    printed = eagle_here("plan", tmp_path / "run.yaml", "--gpus", 4).stdout
    assert f"{needed.parameters:,} parameters\n" in printed
    assert "memory per GPU (4 GPUs, bfloat16, activations selective, 640 tokens per GPU): at least 0.0 GiB, peak in " in printed
    assert (
        "not computed for activations: keep"
        in eagle_here("plan", tmp_path / "run.yaml", "--gpus", 2, "--set", "model.activations=keep").stdout
    )
    refused = eagle_here("plan", tmp_path / "run.yaml", "--gpus", 3)
    assert refused.returncode == 2
    assert "2 ranks don't divide 3 GPUs" in refused.stderr
