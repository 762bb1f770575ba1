"""Sections on evaluation and trackers."""

from typing import Any, Literal

from pydantic import Field

from .section import Section

MetricName = Literal["exact", "choice", "contains", "anls", "numeric", "temporal_iou", "f1", "judge", "teacher_forced", "likelihood"]


class JudgeConfig(Section):
    base_url: str = Field(
        pattern=r"^https?://", description="Address of an OpenAI-compatible server, for example http://127.0.0.1:8000/v1."
    )
    model: str = Field(min_length=1, description="Name of the model there.")
    key_variable: str = Field(default="OPENAI_API_KEY", description="Environment variable of the key; without it no key is sent.")
    parallel: int = Field(default=8, ge=1, description="Requests at once.")
    timeout: float = Field(default=60.0, gt=0, description="Seconds that a request may take.")
    attempts: int = Field(default=5, ge=1, description="Attempts of a request when the server is busy or not reachable.")
    max_tokens: int = Field(default=512, ge=1, description="Longest reply in tokens; models that reason first need room.")


class EvalConfig(Section):
    every: int | None = Field(default=None, ge=1, description="Optimizer steps between evaluations; null: at the end of every stage.")
    limit: int | None = Field(default=None, ge=1, description="Rows used, the first ones of each source; null: all.")
    batch_size: int = Field(default=16, ge=1, description="Questions of one batch.")
    max_new_tokens: int = Field(default=32, ge=1, description="Longest answer in tokens.")
    answer_after: str | None = Field(
        default=None,
        min_length=1,
        description="What stands before the answer when answers begin with reasons, for example 'so ' in 'it is red, so no': only the text "
        "after its last occurrence is compared, of generated, expected and training answers. null: all of it.",
    )
    metrics: dict[str, MetricName] = Field(
        default_factory=dict,
        description="Metric of each held-out source; others: exact. exact, contains, anls, numeric, temporal_iou and f1 compare the "
        "generated answer. choice: the option it names, right only if right in all rotations. judge: by eval.judge; teacher_forced: right "
        "when every answer token is the most likely one; likelihood: the most likely option. The last two generate nothing.",
    )
    loss: bool = Field(
        default=True,
        description="Compute the validation loss of every held-out source: all assistant turns, teacher-forced, in packs.",
    )
    judge: JudgeConfig | None = Field(default=None, description="The server of the metric judge.")


def tracker_of(value: Any) -> Any:
    """`wandb` and `{wandb: {project: p}}` as the section that they stand for."""
    if isinstance(value, str):
        return {"name": value}
    if isinstance(value, dict) and len(value) == 1 and "name" not in value:
        [(name, options)] = value.items()
        return {"name": name, "options": options or {}}
    return value


class TrackerConfig(Section):
    """A program that shows the metrics of the run, in addition to metrics.jsonl."""

    name: Literal["tensorboard", "wandb", "mlflow", "trackio"] = Field(description="Which one.")
    options: dict[str, Any] = Field(default_factory=dict, description="Its own options, for example {project: p, mode: offline} of wandb.")
