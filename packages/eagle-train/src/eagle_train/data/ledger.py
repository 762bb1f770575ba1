"""What was not used, and why: one JSON line per row, so that counts at the end add up to the rows at the start."""

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from eagle_train.errors import counted

from .atomic import naming, replacing
from .lock import waited_for


@dataclass(frozen=True, slots=True)
class Entry:
    """One row that was not used: `where` is `prepare`, the stage that dropped it, or `train`; `line` is 1-based.

    step: of the run (1-based), when training left the row out; else 0, and not written. file: the annotation file, where a source has
    several (lines count over all of them); else not written.
    """

    source: str
    line: int
    reason: str
    detail: str
    where: str = "prepare"
    step: int = 0
    file: str = ""


class Ledger:
    """Entries on disk (`ledger.jsonl`), appended whole lines at a time, read back one by one."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def extend(self, entries: Iterable[Entry]) -> int:
        """Append entries, returns how many."""
        lines = [encode(entry) for entry in entries]
        if lines:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with naming(self.path), open(self.path, "ab") as file:
                file.write(b"".join(lines))
        return len(lines)

    def replace(self, entries: Iterable[Entry], *, where: str) -> None:
        """Write the entries of one origin anew, keeping those of others (a stage that is planned again replaces its own)."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with waited_for(self.path.with_name(f".{self.path.name}.lock")):  # two processes may each replace their own
            kept = [entry for entry in self if entry.where != where]
            write_entries(self.path, [*kept, *entries])

    def rewind(self, step: int) -> None:
        """Forget what came after step `step` of the run: a run that resumes there will write it again."""
        entries = list(self)
        if any(entry.step > step for entry in entries):
            write_entries(self.path, (entry for entry in entries if entry.step <= step))

    def __iter__(self) -> Iterator[Entry]:
        if self.path.exists():
            yield from read_entries(self.path)

    def counts(self) -> Counter[tuple[str, str]]:
        """How many entries per (where, reason)."""
        return Counter((entry.where, entry.reason) for entry in self)


def encode(entry: Entry) -> bytes:
    """One entry as a line."""
    content = asdict(entry)
    for key in ("step", "file"):
        if not content[key]:
            del content[key]
    return json.dumps(content, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"


def write_entries(path: Path, entries: Iterable[Entry]) -> None:
    """A whole ledger file, atomically: the old one or the new one, never half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        for entry in entries:
            file.write(encode(entry))


def read_entries(path: Path) -> Iterator[Entry]:
    """Entries of a ledger file; a last line cut by a crash is left out, it was never complete."""
    with open(path, "rb") as file:
        for line in file:
            if line.endswith(b"\n"):
                yield Entry(**json.loads(line))


def top_reasons(entries: Iterable[Entry], count: int = 5) -> list[str]:
    """Lines `reason: n rows, for example source:line: detail`, most frequent first."""
    examples: dict[str, Entry] = {}
    numbers: Counter[str] = Counter()
    for entry in entries:
        numbers[entry.reason] += 1
        examples.setdefault(entry.reason, entry)
    return [
        f"{reason}: {counted(number, 'row')}, for example {examples[reason].source}:{examples[reason].line}: {examples[reason].detail}"
        for reason, number in numbers.most_common(count)
    ]
