"""Step 4, annotate: question-answer pairs by a model, from the story to the video (top-down) and from clips to the video (bottom-up).

Top-down: dense captions of chapters, led by the chapter's title, are aggregated into pairs about the whole video. Bottom-up: pairs about a
clip become pairs about the whole video by a time anchor ("between 12.0 s and 18.5 s"), or by a context anchor that hints at the scene.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import av
import numpy as np
import pyarrow as pa
from pydantic import Field

from eagle_sampling import MediaError, TimeTable, choose_chapters, probe
from eagle_train.config import ConfigError
from eagle_train.data.ledger import Entry
from eagle_train.executors import call_on_ray

from .answers import NoAnswer, read_batch
from .chapters import BadChapters, Chapter, load_chapters, of_video
from .endpoint import Account, Endpoint, Pending, Request, Schema, digest_of
from .folder import Folder, entry, nothing
from .settings import AnnotateConfig, CurateConfig
from .shown import Shown, jpegs

SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("video", pa.string()),
        ("content", pa.string()),
        ("source", pa.string()),
        ("clip", pa.string()),  # null: about the whole video
        ("mode", pa.string()),  # top_down, clip, time, context
        ("type", pa.string()),
        ("question", pa.string()),  # with its anchor
        ("bare_question", pa.string()),
        ("anchor", pa.string()),  # null: none
        ("answer", pa.string()),
        ("start", pa.float64()),  # where the answer is seen, seconds from the first frame
        ("end", pa.float64()),
        ("whole", pa.bool_()),  # the sample shows the whole video; else start to end
        ("seconds", pa.float64()),  # of what the sample shows
    ]
)


class Caption(Schema):
    """Of one chapter."""

    title: str = Field(min_length=1)
    caption: str = Field(min_length=1)


class Pair(Schema):
    """type: of the pool, or any short name in the top-down mode."""

    type: str = Field(min_length=1)
    question: str = Field(min_length=1)
    answer: str = Field(min_length=1)


class Pairs(Schema):
    """Several pairs."""

    pairs: list[Pair] = Field(min_length=1)


class Context(Schema):
    """A hint at a scene, as the start of a sentence: "When the man opens the door"."""

    anchor: str = Field(min_length=1)


SYSTEM = "You annotate videos for training. Describe only what the frames show. Answer in {language}, as JSON of the given schema."
CAPTION = (
    "These frames are from {start:.1f} s to {end:.1f} s of a video. {title}Describe this part in detail: people, objects, places, actions "
    "and their order, and text that can be read."
)
AGGREGATE = (
    "A video of {seconds:.0f} s has these parts:\n{parts}\n\nWrite {count} questions about the whole video that need several of its parts, "
    "each with a complete answer: its story, causes and effects, the order of events, how something changes. Do not mention captions."
)
ASK = (
    "These frames are one scene of a longer video. Write {count} question-answer pairs about it, one of each of these types:\n{types}\n"
    "A question must not be answerable without seeing the scene, and must not mention frames or times."
)
ANCHOR = (
    "These frames are one scene of a longer video. Question: {question}\nAnswer: {answer}\nWrite a context anchor: the start of a sentence "
    "that lets a reader find this scene in the whole video (for example, 'When the man opens the door'), without giving the answer away."
)


@dataclass(frozen=True)
class Report:
    """rows: of annotate.parquet; pending: requests in a batch file (the result is then left as it is); problems: of a batch's results."""

    rows: int
    account: Account
    pending: int
    problems: tuple[str, ...] = ()


class _Span(NamedTuple):
    """A chapter or clip. line: of the clip in select.parquet, 1-based, or the video's first one."""

    video: str
    content: str
    source: str
    clip: str | None
    line: int
    start: float
    end: float
    title: str | None
    times: tuple[float, ...]


class _Video(NamedTuple):
    info_seconds: float
    times: TimeTable
    spans: list[_Span]


def annotate(
    config: CurateConfig,
    *,
    batch_out: Path | None = None,
    batch_in: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Report:
    """Annotate the clips of `select.parquet`.

    batch_out: write the requests that have no answer yet to this file instead of sending them; run again with the results as batch_in,
    until none is pending (captions come before the questions that are made of them).
    """
    folder = Folder(config.folder)
    clips = folder.read("select")
    if not clips.num_rows:
        raise nothing("annotate", "select", folder.ledger.path)
    if batch_out is not None and batch_in is not None and batch_out.absolute() == batch_in.absolute():
        raise ConfigError(f"--batch-in and --batch-out are both {batch_in}: the results would be written over; name another file")
    frames = call_on_ray(jpegs) if config.executor == "ray" else jpegs
    endpoint = Endpoint(config.annotate.endpoint, folder.path / "answers.jsonl", batch=batch_out, frames=frames)
    problems: list[str] = []
    if batch_in is not None:
        _, problems = read_batch(batch_in, endpoint.answers)
    work = _Work(config, endpoint, folder)
    rows: list[dict[str, Any]] = []
    if "bottom_up" in config.annotate.modes:
        rows += work.bottom_up(clips, progress)
    if "top_down" in config.annotate.modes:
        rows += work.top_down(clips, folder.read("split"), progress)
    if endpoint.batch is not None and endpoint.batch.count:
        return Report(0, endpoint.account, endpoint.batch.count, tuple(problems))
    table = pa.Table.from_pylist(rows, schema=SCHEMA)
    # Threads finish in any order; the file does not depend on it.
    folder.replace("annotate", table, sorted(work.entries, key=lambda item: (item.source, item.line, item.detail)))
    return Report(table.num_rows, endpoint.account, 0, tuple(problems))


class _Work:
    """One run: the endpoint, and the entries for the ledger."""

    def __init__(self, config: CurateConfig, endpoint: Endpoint, folder: Folder) -> None:
        self.config = config
        self.settings: AnnotateConfig = config.annotate
        self.endpoint = endpoint
        self.system = SYSTEM.format(language=self.settings.language)
        self.entries: list[Entry] = []
        self._tables: dict[str, tuple[TimeTable, float] | str] = {}

    def bottom_up(self, clips: pa.Table, progress: Callable[[int, int], None] | None) -> list[dict[str, Any]]:
        spans = [self._span(row, line, row["start"], row["end"], row["title"], row["clip"]) for line, row in _rows(clips)]
        found = self.endpoint.map(self._clip_pairs, [span for span in spans if span is not None], progress)
        return [row for rows in found for row in rows]

    def _clip_pairs(self, span: _Span) -> list[dict[str, Any]]:
        names = draw_types(list(self.settings.questions), self.settings.questions_per_clip, f"{span.content}{span.start}")
        types = "\n".join(f"- {name}: {self.settings.questions[name]}" for name in names)
        shown = self._shown(span)
        pairs = self._ask(Request("clip", self.system, ASK.format(count=len(names), types=types), shown, Pairs), span)
        rows = []
        for pair in self._one_of_each(pairs.pairs, names, span) if pairs is not None else ():
            for mode in self.settings.anchors:
                if mode == "clip":
                    rows.append(self._row(span, "clip", pair, None, pair.question, whole=False))
                elif mode == "time":
                    anchor = f"Between {span.start:.1f} s and {span.end:.1f} s"
                    rows.append(self._row(span, "time", pair, anchor, anchored(anchor, pair.question), whole=True))
                else:
                    prompt = ANCHOR.format(question=pair.question, answer=pair.answer)
                    context = self._ask(Request("anchor", self.system, prompt, shown, Context), span)
                    if context is not None:
                        text = anchored(context.anchor, pair.question)
                        rows.append(self._row(span, "context", pair, context.anchor, text, whole=True))
        return rows

    def _one_of_each(self, pairs: list[Pair], names: list[str], span: _Span) -> list[Pair]:
        """The first pair of each type that was asked for; the ledger names types without a pair, and the other pairs."""
        found: dict[str, Pair] = {}
        for pair in pairs:
            if pair.type not in names:
                self._note(span, "bad-answer", f"the pair has type {pair.type!r}, asked for were {', '.join(names)}")
            elif pair.type in found:
                self._note(span, "bad-answer", f"a further pair has type {pair.type!r}, asked for was one: {pair.question[:200]}")
            else:
                found[pair.type] = pair
        if missing := [name for name in names if name not in found]:
            self._note(span, "bad-answer", f"the answer has no pair of type {', '.join(missing)}")
        return list(found.values())

    def top_down(self, clips: pa.Table, split: pa.Table, progress: Callable[[int, int], None] | None) -> list[dict[str, Any]]:
        chosen: dict[str, int] = {}
        for line, row in _rows(clips):
            chosen.setdefault(row["video"], line)
        known = load_chapters(self.config.chapters) if self.config.chapters is not None else {}
        by_video: dict[str, list[dict[str, Any]]] = {}
        for _, row in _rows(split):
            if row["video"] in chosen:
                by_video.setdefault(row["video"], []).append(row)
        spans: list[_Span] = []
        for video, rows in by_video.items():
            for start, end, title in self._chapters(video, rows, known, chosen[video]):
                span = self._span(rows[0], chosen[video], start, end, title, None)
                if span is not None:
                    spans.append(span)
        captions = self.endpoint.map(self._caption, spans, progress)
        whole: dict[str, list[tuple[_Span, Caption]]] = {}
        failed: set[str] = set()
        for span, caption in zip(spans, captions):
            if caption is None:
                failed.add(span.video)  # a story with a part missing would be told wrong
            else:
                whole.setdefault(span.video, []).append((span, caption))
        stories = [(by_video[video][0]["video_seconds"], parts) for video, parts in whole.items() if video not in failed]
        found = self.endpoint.map(self._video_pairs, stories, progress)
        return [row for rows in found for row in rows]

    def _chapters(
        self, video: str, rows: list[dict[str, Any]], known: dict[str, list[Chapter]], line: int
    ) -> list[tuple[float, float, str | None]]:
        """(start, end, title) of a video's chapters; where there are none, of groups of neighbouring clips, without titles."""
        if all(row["begins"] == "chapter" for row in rows):
            return [(row["start"], row["end"], row["title"]) for row in rows]
        seconds = rows[0]["video_seconds"]
        try:
            chapters = of_video(video, known)
        except (BadChapters, av.FFmpegError, OSError) as error:
            self.entries.append(entry("annotate", video, line, "bad-chapters", f"{error}; clips are grouped instead"))
            chapters = []
        if chapters:
            ends = [*(chapter.start for chapter in chapters[1:]), seconds]
            spans = [(chapter.start, min(chapter.end or after, seconds), chapter.title) for chapter, after in zip(chapters, ends)]
            return [(start, end, title) for start, end, title in spans if end > start]
        size = self.settings.chapter_clips
        groups = [rows[first : first + size] for first in range(0, len(rows), size)]
        return [(group[0]["start"], group[-1]["end"], None) for group in groups]

    def _caption(self, span: _Span) -> Caption | None:
        title = f"Its chapter is titled {span.title!r}. " if span.title else ""
        prompt = CAPTION.format(start=span.start, end=span.end, title=title)
        return self._ask(Request("caption", self.system, prompt, self._shown(span), Caption), span)

    def _video_pairs(self, story: tuple[float, list[tuple[_Span, Caption]]]) -> list[dict[str, Any]]:
        seconds, parts = story
        first = parts[0][0]
        lines = [f"{span.start:.1f}-{span.end:.1f} s, {span.title or caption.title}: {caption.caption}" for span, caption in parts]
        prompt = AGGREGATE.format(seconds=seconds, parts="\n".join(lines), count=self.settings.questions_per_video)
        pairs = self._ask(Request("video", self.system, prompt, None, Pairs), first)
        span = first._replace(clip=None, start=0.0, end=seconds)
        return [self._row(span, "top_down", pair, None, pair.question, whole=True) for pair in (pairs.pairs if pairs is not None else ())]

    def _ask(self, request: Request[Any], span: _Span) -> Any:
        """The answer, or None: then the ledger has the reason, or the request waits in a batch file."""
        try:
            return self.endpoint.ask(request)
        except NoAnswer as problem:
            self._note(span, problem.reason, f"{request.purpose}: {problem.detail}")
        except Pending:
            pass
        return None

    def _note(self, span: _Span, reason: str, detail: str) -> None:
        self.entries.append(entry("annotate", span.video, span.line, reason, f"{span.start:.1f}-{span.end:.1f} s: {detail}"))

    def _shown(self, span: _Span) -> Shown:
        return Shown(span.video, span.content, span.times, self.settings.side)

    def _span(self, row: dict[str, Any], line: int, start: float, end: float, title: str | None, clip: str | None) -> _Span | None:
        """A chapter or clip with the times of its frames; None: the ledger says why."""
        video = row["video"]
        if video not in self._tables:
            try:
                info = probe(video)
                self._tables[video] = (info.times, info.duration or 0.0) if info.times is not None else f"{video}: has no frame times"
            except MediaError as error:
                self._tables[video] = str(error)
        known = self._tables[video]
        if not isinstance(known, str):
            seconds = known[0].times()
            try:
                bounds = [(float(seconds[0]) + start, float(seconds[0]) + end)]
                (times,) = choose_chapters(seconds, bounds, fps=self.settings.fps, max_frames=self.settings.max_frames)
                shown = tuple(np.round(times - seconds[0], 6).tolist())
                return _Span(video, row["content"], row["source"], clip, line, start, end, title, shown)
            except ValueError as error:
                known = str(error)
        self.entries.append(entry("annotate", video, line, "bad-video", known))
        return None

    def _row(self, span: _Span, mode: str, pair: Pair, anchor: str | None, question: str, *, whole: bool) -> dict[str, Any]:
        known = self._tables[span.video]
        seconds = span.end - span.start
        if whole and not isinstance(known, str):
            seconds = known[1]
        return {
            "id": digest_of(f"{span.content}|{mode}|{span.start}|{span.end}|{question}"),
            "video": span.video,
            "content": span.content,
            "source": span.source,
            "clip": span.clip,
            "mode": mode,
            "type": pair.type,
            "question": question,
            "bare_question": pair.question,
            "anchor": anchor,
            "answer": pair.answer,
            "start": span.start,
            "end": span.end,
            "whole": whole,
            "seconds": seconds,
        }


def anchored(anchor: str, question: str) -> str:
    """The question behind its anchor: "When the door opens, what does he hold?"."""
    anchor = anchor.strip().rstrip(",.;:")
    first = question.split(maxsplit=1)[0] if question.split() else ""
    small = question if first.isupper() and len(first) > 1 else question[:1].lower() + question[1:]
    return f"{anchor}, {small}"


def draw_types(pool: list[str], count: int, seed: str) -> list[str]:
    """`count` types of the pool (all, when it has fewer), a pure function of the seed."""
    numbers = [hashlib.blake2b(f"{seed}{name}".encode(), digest_size=8).digest() for name in pool]
    return [name for _, name in sorted(zip(numbers, pool))][:count]


def _rows(table: pa.Table) -> list[tuple[int, dict[str, Any]]]:
    """(1-based line, row) of a table."""
    return list(enumerate(table.to_pylist(), start=1))
