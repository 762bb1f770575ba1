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
    r"\bword for word\b(?! in\b)": "exact match",
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
# Parts of the repository that still have findings. The set only shrinks: a part that is clean is removed from it (a test says which).
NOT_YET_CLEAN: set[str] = set()


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


def excused(path: Path) -> str | None:
    """The part of `NOT_YET_CLEAN` that a file belongs to."""
    return next((part for part in NOT_YET_CLEAN if path.as_posix() == part or path.as_posix().startswith(part + "/")), None)


def test_words_that_stay_out():
    found = [one for path in files() if excused(path) is None for one in findings(path)]
    assert not found, "\n".join(found)


def test_parts_that_are_clean_are_not_excused():
    needed = {excused(path) for path in files() if findings(path)}
    assert not NOT_YET_CLEAN - needed, f"remove from NOT_YET_CLEAN: {sorted(NOT_YET_CLEAN - needed)}"


def test_the_search_finds_something(tmp_path):
    text = "Ask held-out questions without looking.\nx is no number; left out: the first. There is no file. It is no longer here."
    (tmp_path / "page.md").write_text(text)
    assert len(findings(tmp_path / "page.md")) == 4


if __name__ == "__main__":
    for one in files():
        print(*findings(one), sep="\n", end="\n" if findings(one) else "")
