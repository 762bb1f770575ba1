"""Tables for the terminal."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from eagle_train.errors import counted

if TYPE_CHECKING:
    from eagle_train.config import Config
    from eagle_train.evaluation.metrics import Evaluation, Score
    from eagle_train.planning.mixture import SourceDraws
    from eagle_train.planning.stages import StageSchedule
    from eagle_train.runs.leftovers import Leftover
    from eagle_train.runs.prediction import Rate, StagePrediction
    from eagle_train.runs.ready import Ready
    from eagle_train.runs.resources import Resources
    from eagle_train.runs.sweep import Point
    from eagle_train.training.trainer import Trainer


PLAN_COLUMNS = (
    "stage",
    "L_max",
    "rows",
    "samples",
    "dropped",
    "packs",
    "fill",
    "longest",
    "tokens",
    "tiles",
    "labels",
    "steps/epoch",
    "steps",
)
PLAN_LEGEND = """\
  L_max: tokens of a pack. rows: distinct rows of the first epoch; samples: with repetitions (repeat_time, weight); dropped: too long.
  fill: tokens / (packs x L_max). longest: tokens of the longest sample. labels: tokens with a loss. steps: optimizer steps of the stage."""

DRAWS_COLUMNS = ("fit", "drawn", "samples", "tokens", "share", "passes", "most")
DRAWS_LEGEND = """\
  fit: rows that fit the stage. drawn: distinct rows of the first epoch. share: of its tokens. passes: samples / fit.
  most: draws of the row that is drawn most often."""


def table(rows: Sequence[Sequence[str]]) -> str:
    """Columns: the first to the left, the others to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [cell.ljust(width) if index == 0 else cell.rjust(width) for index, (cell, width) in enumerate(zip(row, widths))]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def defaults_text(config: Config) -> str:
    """A line for every value that the configuration file does not set."""
    from eagle_train.config import explain_defaults

    return "\n".join(f"default  {default.path} = {default.value}" for default in explain_defaults(config))


def plan_table(schedules: Sequence[StageSchedule]) -> str:
    """The stages of a run before it is trained: numbers of one epoch, and how many steps are made."""
    rows = [
        ("stage", "L_max", "rows", "samples", "dropped", "packs", "fill", "longest", "tokens", "tiles", "labels", "steps/epoch", "steps")
    ]
    notes = []
    for schedule in schedules:
        s = schedule.plan(0).summary()
        rows.append(
            (
                schedule.stage.name,
                str(schedule.stage.max_tokens),
                str(s.rows_used),
                str(s.samples),
                str(s.rows_dropped),
                str(s.packs),
                f"{s.fill:.1%}",
                str(s.longest_sample),
                str(s.tokens),
                str(s.tiles),
                str(s.label_tokens),
                str(s.steps),
                str(schedule.steps),
            )
        )
        for reason, number in s.drops.items():
            notes.append(f"stage {schedule.stage.name}: {counted(number, 'row')} dropped: {reason}")
    return "\n".join([table(rows), *notes])


def draws_table(schedules: Sequence[StageSchedule]) -> str:
    """What the first epoch of each stage takes from each source; nothing for runs of one source."""
    if len(schedules[0].facts.sources) < 2:
        return ""
    rows = [("stage", "source", *DRAWS_COLUMNS)]
    for schedule in schedules:
        rows += [(schedule.stage.name, *cells) for cells in draws_rows(schedule.plan(0).draws())]
    return f"{table(rows)}\n{DRAWS_LEGEND}"


def draws_rows(draws: Sequence[SourceDraws]) -> Iterator[tuple[str, ...]]:
    """The cells of each source: its name, then DRAWS_COLUMNS."""
    for one in draws:
        numbers = map(str, (one.rows, one.drawn, one.samples, one.tokens))
        yield one.name, *numbers, f"{one.share:.1%}", f"{one.passes:.2f}", str(one.most)


def position_warnings(ready: Ready) -> Iterator[str]:
    """A warning for each stage with samples longer than the positions that the model was made for; positions restart at every sample."""
    most = ready.sizes.text_config.max_position_embeddings
    for schedule in ready.schedules:
        plan = schedule.plan(0)
        longer = plan.visual.tokens[plan.rows()] > most
        if longer.any():
            yield (
                f"warning: stage {schedule.stage.name}: {counted(int(longer.sum()), 'row')} longer than the {most} positions of the model "
                "(max_position_embeddings); lower max_tokens, or scale positions: model.overrides.text_config.rope_parameters"
            )


def resources_text(needed: Resources) -> str:
    """Parameters, and the memory of each GPU."""
    lines = [f"{needed.parameters:,} parameters"]
    where = f"{counted(needed.gpus, 'GPU')}, {needed.dtype}, activations {needed.activations}, {needed.tokens} tokens per GPU"
    if needed.memory is None:
        lines.append(f"memory ({where}): not computed for activations: keep; the other values of model.activations are")
    else:
        gpu, host = needed.memory.gpu / 2**30, needed.memory.host / 2**30
        least = "at least " if needed.activations == "selective" else ""
        lines.append(f"memory per GPU ({where}): {least}{gpu:.1f} GiB, peak in {needed.memory.moment}")
        lines.append("  without the CUDA context (0.5 GiB) and fragmentation; for the longest pack")
        if needed.memory.host:
            lines.append(f"host memory per GPU: {host:.1f} GiB")
    return "\n".join(lines)


def prediction_text(stages: Sequence[StagePrediction], gpus: int, rate: Rate) -> str:
    """Memory, time and balance of every stage."""
    from eagle_train.training.metrics import duration

    rows = [("stage", "trained", "GiB per GPU", "s per step", "steps", "time", "GPU hours", "waiting", "by tokens")]
    for stage in stages:
        hours = stage.gpu_hours(gpus)
        rows.append(
            (
                stage.name,
                f"{stage.trained:,}",
                "-" if stage.gib is None else f"{stage.gib:.1f}",
                f"{stage.seconds:.3g}",
                str(stage.steps),
                duration(stage.steps * stage.seconds),
                f"{hours:.3g}",
                f"{stage.after:.1%}",
                f"{stage.before:.1%}",
            )
        )
    total = sum(stage.gpu_hours(gpus) for stage in stages)
    return "\n".join(
        [
            table(rows),
            "  trained: parameters with gradients and optimizer states, of all GPUs together",
            f"  time: of training alone, at {rate.flops / 1e12:.3g} TFLOP/s per GPU ({rate.source}); {total:.3g} GPU hours in all",
            "  waiting: share of the time that data groups wait for one another; by tokens: if packs were balanced by tokens alone",
            *(f"  {stage.name}: {stage.kept}" for stage in stages if stage.kept),
        ]
    )


def leftovers_table(found: Sequence[Leftover]) -> str:
    """What `eagle clean` removes: where, what, how much, and when it was last used."""
    rows = [("folder", "what", "files", "MiB", "last used")]
    for one in found:
        used = time.strftime("%Y-%m-%d", time.localtime(one.used))
        rows.append((str(one.folder), one.what, f"{len(one.files):,}", f"{one.bytes / (1 << 20):,.1f}", used))
    count, size = sum(len(one.files) for one in found), sum(one.bytes for one in found)
    return table([*rows, ("all", "", f"{count:,}", f"{size / (1 << 20):,.1f}", "")])


def start_line(trainer: Trainer) -> str:
    """What is trained, and where, before the first step."""
    from eagle_model.quantized import parameter_count

    parameters = parameter_count(trainer.model)
    learning = sum(parameter.numel() for parameter in trainer.model.parameters() if parameter.requires_grad)
    part = "" if learning == parameters else f" ({learning:,} of them learn in the first stage)"
    world, dtype = trainer.world, trainer.config.parallel.dtype
    ranks = f", {world.size} ranks" if world.size > 1 else ""
    return f"training {parameters:,} parameters{part}, {trainer.total_steps} steps, {dtype} on {world.device.type}{ranks}"


def row_counts(schedules: Sequence[StageSchedule]) -> dict[str, int]:
    """Where all rows of the sources went; the parts add up to `all`."""
    import numpy as np

    facts = schedules[0].facts
    planned, dropped = np.zeros(len(facts), bool), np.zeros(len(facts), bool)
    for schedule in schedules:
        first = schedule.plan(0)
        planned[first.pack_rows] = True
        dropped[first.drop_rows] = True
    bad = sum(source.bad_rows for source in facts.sources)
    good, fit_none = int(planned.sum()), int((dropped & ~planned).sum())
    left = len(facts) - good - fit_none
    return {"all": len(facts) + bad, "planned": good, "unusable": bad, "too_long_for_every_stage": fit_none, "not_drawn": left}


def rows_line(schedules: Sequence[StageSchedule], missing: int = 0, concealed: int = 0) -> str:
    """`row_counts` in a line. missing: samples that vanished while training; concealed: damaged frames that were trained."""
    counts = row_counts(schedules)
    parts = [f"{number} {what.replace('_', ' ')}" for what, number in counts.items() if what == "planned" or (number and what != "all")]
    text = f"{counted(counts['all'], 'row')}: {', '.join(parts)}"
    text += f"; {counted(missing, 'sample')} could not be read while training" if missing else ""
    return text + (f"; {counted(concealed, 'damaged frame')} concealed by the decoder, listed in ledger-train.jsonl" if concealed else "")


def score_table(result: Evaluation, *, baseline: bool = True) -> str:
    """Per source: accuracy with its 95 % interval, clustered by medium, the text-only baseline (if there is one), and the validation loss.

    Accuracy also for questions that are not yes or no.
    """
    rows = [("questions", "count", "right", "95 % interval", "text-only", "loss")]

    def add(name: str, score: Score, loss: str = "") -> None:
        text_only = f"{score.text_only:.3f}" if baseline else "-"
        rows.append((name, str(score.questions), f"{score.accuracy:.3f}", _interval(score.low, score.high), text_only, loss))

    by_source = result.by_source()
    for source, score in by_source.items():
        add(source, score, f"{result.losses[source].loss:.4f}" if source in result.losses else "-")
        unread = sum(bool(answer.problem) for answer in result.answers if answer.source == source)
        if unread:
            rows.append((f"  of them not answerable (counted wrong): {unread}", "", "", "", "", ""))
        for expected in ("open", "yes/no"):
            part = result.score(
                lambda answer, source=source, closed=expected == "yes/no": (
                    answer.source == source and (answer.expected.casefold() in ("yes", "no")) == closed
                )
            )
            if 0 < part.questions < score.questions:
                add(f"  {expected}", part)
    return table(rows)


def sweep_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """A line per source, number of frames and context length; rows: those of `Point.rows`."""
    lines = [("source", "frames", "max_tokens", "questions", "unanswered", "right", "95 % interval", "text-only", "loss")]
    for row in sorted(rows, key=lambda row: str(row["source"])):
        lines.append(
            (  # pyright: ignore[reportArgumentType]
                row["source"],
                *(str(row[key]) if row[key] is not None else "-" for key in ("frames", "max_tokens", "questions", "unanswered")),
                f"{row['accuracy']:.3f}",
                _interval(row["low"], row["high"]),
                f"{row['text_only']:.3f}" if row["text_only"] is not None else "-",
                f"{row['loss']:.4f}" if "loss" in row else "-",
            )
        )
    return table(lines)


def frames_table(points: Sequence[Point]) -> str:
    """A line per question text, a column per number of frames that a video has at most; the text-only baseline is that of the last."""
    questions = sorted({answer.question for point in points for answer in point.evaluation.answers})
    lines = [("right with at most", "count", *(counted(point.frames or 0, "frame") for point in points), "text-only")]
    for question in questions:
        scores = [point.evaluation.score(lambda answer, question=question: answer.question == question) for point in points]
        lines.append((question, str(scores[-1].questions), *(f"{s.accuracy:.3f}" for s in scores), f"{scores[-1].text_only:.3f}"))
    return table(lines)


def _interval(low: float, high: float) -> str:
    return f"{low:.3f} - {high:.3f}"
