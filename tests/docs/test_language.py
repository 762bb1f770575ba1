"""Words that stay out of code, documentation, messages and tests: a reader should not have to decode a private vocabulary.

docs/glossary.md has the terms to use. `python tests/docs/test_language.py` prints every finding with file and line.
"""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
GLOBS = (
    "*.md",
    "*.toml",
    ".ci/*",
    "docs/**/*",
    "examples/**/*",
    "benchmarks/**/*.py",
    "benchmarks/**/*.md",
    "packages/*/*.md",
    "packages/*/pyproject.toml",
    "packages/*/src/**/*",
    "packages/*/benchmarks/*.py",
    "tests/**/*.py",
)
SUFFIXES = {".py", ".md", ".txt", ".html", ".toml", ".yaml", ".yml", ".css", ".js", ""}

# Pattern (case is ignored) and what to write instead.
PHRASES = {
    r"\bwithout looking\b|\bnever looks?\b|\bblind(?!s)": "text-only baseline",
    r"\bcan't be asked\b|\b(ask|asks|asking) (it|held-out|a run|all held-out|the model)\b": "evaluate",
    r"\bword for word\b": "exact match",
    r"\bcan be told\b|\bunless told\b|\b(is|are|was|were|been) told\b|\bsomebody has news\b|\bhas news\b": "say what is passed to whom",
    r"\bleft out: (the|that of|a|an|runs)\b": "default: the ...",
    r"(?<!there )\b(is|are|was|were) no (?!longer|more|less|fewer|other|faster|slower|better)[a-z]": "is not a ...",
    r"\bhomeward": "towards the root; or name the direction",
    r"\bthe house\b|^## rooms\b|^floors of\b|\bfloors inside\b": "layout, packages, layers",
    r"\bcures?\b|\bcured\b": "fix, remedy, next step",
    r"\bforesaw\b|\bforeseen\b": "expected",
    r"\bbeside\b": "next to",
    r"(?<!nothing )\bbut for\b": "except",
    r"\bof roof\b|\broofs?\b": "fraction of the ceiling",
    r"\bmade up for\b": "repeated, run again",
    r"\bmay be given often\b": "may be repeated",
    r"\byardstick\b": "reference",
    r"\bimport never climbs\b": "imports only go to lower layers",
    r"\bdon't know each other\b|\bdo not know each other\b": "do not import each other",
    r"\bsomebody\b|\bwhoever\b": "name the caller, the user or the process",
}
# Files that still have findings. The list only shrinks: a file that is clean is removed from it (a test says which), and none is added.
NOT_YET_CLEAN: set[str] = {
    "docs/run-folder.md",
    "packages/eagle-cp/CHANGELOG.md",
    "packages/eagle-cp/README.md",
    "packages/eagle-cp/benchmarks/bench.py",
    "packages/eagle-cp/benchmarks/check.py",
    "packages/eagle-cp/src/eagle_cp/core.py",
    "packages/eagle-cp/src/eagle_cp/planner.py",
    "packages/eagle-cp/src/eagle_cp/tiles.py",
    "packages/eagle-kernels/README.md",
    "packages/eagle-kernels/benchmarks/__init__.py",
    "packages/eagle-kernels/benchmarks/operators.py",
    "packages/eagle-kernels/benchmarks/report.py",
    "packages/eagle-kernels/benchmarks/tune.py",
    "packages/eagle-kernels/src/eagle_kernels/dispatch.py",
    "packages/eagle-kernels/src/eagle_kernels/memory.py",
    "packages/eagle-model/src/eagle_model/checkpoint.py",
    "packages/eagle-model/src/eagle_model/decoder.py",
    "packages/eagle-model/src/eagle_model/messages.py",
    "packages/eagle-model/src/eagle_model/processor.py",
    "packages/eagle-model/src/eagle_model/prompt.py",
    "packages/eagle-model/src/eagle_model/prompt_costs.py",
    "packages/eagle-model/src/eagle_model/tokenizer.py",
    "packages/eagle-model/src/eagle_model/vision.py",
    "packages/eagle-sampling/CHANGELOG.md",
    "packages/eagle-sampling/README.md",
    "packages/eagle-sampling/src/eagle_sampling/budget/answer.py",
    "packages/eagle-sampling/src/eagle_sampling/budget/sample.py",
    "packages/eagle-sampling/src/eagle_sampling/containers/demux.py",
    "packages/eagle-sampling/src/eagle_sampling/containers/matroska_blocks.py",
    "packages/eagle-sampling/src/eagle_sampling/images.py",
    "packages/eagle-sampling/src/eagle_sampling/lmdb_build.py",
    "packages/eagle-sampling/src/eagle_sampling/lmdb_sources.py",
    "packages/eagle-sampling/src/eagle_sampling/lmdb_store.py",
    "packages/eagle-sampling/src/eagle_sampling/video_av1.py",
    "packages/eagle-sampling/src/eagle_sampling/video_info.py",
    "packages/eagle-tiling/src/eagle_tiling/cut.py",
    "packages/eagle-tiling/src/eagle_tiling/draw.py",
    "packages/eagle-train/CHANGELOG.md",
    "packages/eagle-train/README.md",
    "packages/eagle-train/benchmarks/planning.py",
    "packages/eagle-train/src/eagle_train/cli/__init__.py",
    "packages/eagle-train/src/eagle_train/cli/answers.py",
    "packages/eagle-train/src/eagle_train/cli/data.py",
    "packages/eagle-train/src/eagle_train/cli/doctor.py",
    "packages/eagle-train/src/eagle_train/cli/help.txt",
    "packages/eagle-train/src/eagle_train/cli/inspection.py",
    "packages/eagle-train/src/eagle_train/cli/options.py",
    "packages/eagle-train/src/eagle_train/cli/progress.py",
    "packages/eagle-train/src/eagle_train/cli/run.py",
    "packages/eagle-train/src/eagle_train/cli/tables.py",
    "packages/eagle-train/src/eagle_train/cli/train.py",
    "packages/eagle-train/src/eagle_train/config/schema.py",
    "packages/eagle-train/src/eagle_train/data/facts.py",
    "packages/eagle-train/src/eagle_train/data/measure.py",
    "packages/eagle-train/src/eagle_train/data/parts.py",
    "packages/eagle-train/src/eagle_train/data/prepare.py",
    "packages/eagle-train/src/eagle_train/data/recipe.py",
    "packages/eagle-train/src/eagle_train/data/sample.py",
    "packages/eagle-train/src/eagle_train/planning/packing.py",
    "packages/eagle-train/src/eagle_train/planning/visual.py",
    "packages/eagle-train/src/eagle_train/quickstart/build.py",
    "packages/eagle-train/src/eagle_train/quickstart/easy_vqa_data.py",
    "packages/eagle-train/src/eagle_train/quickstart/run.py",
    "packages/eagle-train/src/eagle_train/training/batch.py",
    "packages/eagle-train/src/eagle_train/training/checkpoint.py",
    "packages/eagle-train/src/eagle_train/training/evaluate.py",
    "packages/eagle-train/src/eagle_train/training/folder.py",
    "packages/eagle-train/src/eagle_train/training/loader.py",
    "packages/eagle-train/src/eagle_train/training/model.py",
    "packages/eagle-train/src/eagle_train/training/parallel.py",
    "packages/eagle-train/src/eagle_train/training/run.py",
    "packages/eagle-train/src/eagle_train/training/sharing.py",
    "packages/eagle-train/src/eagle_train/training/trainer.py",
    "packages/eagle-train/src/eagle_train/watching/progress.py",
    "packages/eagle-train/src/eagle_train/watching/report.py",
    "tests/cp/test_gpu.py",
    "tests/kernels/test_compile.py",
    "tests/model/test_sharded.py",
    "tests/sampling/test_budget.py",
    "tests/sampling/test_budget_columns.py",
    "tests/sampling/test_images.py",
    "tests/system/test_quickstart_way.py",
    "tests/train/test_activations.py",
    "tests/train/test_bad_input.py",
    "tests/train/test_cli.py",
    "tests/train/test_config.py",
    "tests/train/test_evaluate.py",
    "tests/train/test_packing.py",
    "tests/train/test_parallel.py",
    "tests/train/test_report.py",
    "tests/train/test_sample.py",
    "tests/train/train_on_ranks.py",
}


def files() -> list[Path]:
    """Every file that is checked, relative to the repository root."""
    found = {path for pattern in GLOBS for path in ROOT.glob(pattern) if path.is_file() and path.suffix in SUFFIXES}
    return sorted(path.relative_to(ROOT) for path in found if path != Path(__file__) and "__pycache__" not in path.parts)


def findings(path: Path) -> list[str]:
    """`file:line: phrase (write: ...)` for one file."""
    result = []
    for number, line in enumerate((ROOT / path).read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        for pattern, instead in PHRASES.items():
            for match in re.finditer(pattern, line, flags=re.IGNORECASE):
                result.append(f"{path}:{number}: {match[0]!r} (write: {instead})")
    return result


def test_words_that_stay_out():
    found = [one for path in files() if str(path) not in NOT_YET_CLEAN for one in findings(path)]
    assert not found, "\n".join(found)


def test_files_that_are_clean_are_not_excused():
    names = {str(path) for path in files()}
    gone = sorted(NOT_YET_CLEAN - names)
    clean = sorted(name for name in NOT_YET_CLEAN & names if not findings(Path(name)))
    assert not gone + clean, f"remove from NOT_YET_CLEAN: {gone + clean}"


def test_the_search_finds_something(tmp_path):
    text = "Ask held-out questions without looking.\nx is no number; left out: the first. There is no file. It is no longer here."
    (tmp_path / "page.md").write_text(text)
    assert len(findings(tmp_path / "page.md")) == 4


if __name__ == "__main__":
    for one in files():
        print(*findings(one), sep="\n", end="\n" if findings(one) else "")
