"""The arms: configurations of eagle that differ in one respect, trained on the same number of tokens.

As the paper's training starts from a model that knows images, arms start from models of the same size, two per seed, that know letters on
single tiles and cards in short videos.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, NamedTuple

from data import LENGTHS, SHORTEST
from letters import ASPECTS
from sizes import Budget, Size

FRAMES = (16, 32, 64, 128, 256, 512)

IMAGE_EXPERIMENTS = frozenset({"tiling", "fill"})
"""The others are about videos."""


class Run(NamedTuple):
    """One training and its evaluation.

    after: name of the run whose model it starts from. frames, swept: evaluated at these numbers of frames on these held-out sources, and
    once on the others.
    """

    experiment: str
    arm: str
    seed: int
    config: dict[str, Any]
    after: str | None = None
    frames: tuple[int, ...] = ()
    swept: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Of the folder of the run."""
        return f"{self.experiment}-{self.arm}-{self.seed}"


class Setting(NamedTuple):
    """What the runs of a seed share. root: of the data. scale: multiplies steps."""

    root: Path
    seed: int
    size: Size
    scale: float

    def steps(self, budget: Budget) -> int:
        """Of a stage with the budget."""
        return max(3, round(budget.steps * self.scale))

    def stage(self, kind: str, name: str, budget: Budget, **more: Any) -> dict[str, Any]:
        """A stage of a kind of model; `more` replaces its keys."""
        shape = {"loss_weighting": "token", "schedule": "cosine", "final_lr_ratio": 0.02, "warmup_ratio": 0.05}
        amount = {"name": name, "max_tokens": budget.tokens, "steps": self.steps(budget), "packs_per_step": budget.packs}
        return self.size.optimizer[kind] | shape | amount | more

    def progressive(self, budget: Budget, contexts: tuple[int, ...], **more: Any) -> list[dict[str, Any]]:
        """Equal tokens at each context; every step has those of the longest. One schedule of the learning rate over all stages."""
        stages = []
        for number, tokens in enumerate(contexts):
            last = number == len(contexts) - 1
            shape = {} if last else {"schedule": "constant", "final_lr_ratio": 0.0}
            warm = {"warmup_ratio": 0.05 * len(contexts) if number == 0 else 0.0, "carry_optimizer": number > 0}
            share = Budget(tokens, budget.steps // len(contexts), budget.packs * budget.tokens // tokens)
            stages.append(self.stage("video", f"s{tokens}", share, **shape, **warm, **more))
        return stages

    def config(
        self, kind: str, train: dict[str, str], held_out: dict[str, str], stages: list[dict[str, Any]], **sections: Any
    ) -> dict[str, Any]:
        """kind: of the model. train, held_out: files by source name."""
        root, size = self.root, self.size
        sources = {name: {"annotation": str(root / f"{file}.jsonl")} for name, file in train.items()}
        tests = {name: {"annotation": str(root / f"{file}.jsonl")} for name, file in held_out.items()}
        facts = "-".join(sorted({*train.values()}))[:150]
        data = {"sources": sources, "eval_sources": tests, "facts": str(root / "facts" / facts), "verify": "header"}
        config = {
            "model": {"preset": "tiny", "tokenizer": str(root / "tokenizer"), "activations": "keep", "overrides": size.model[kind]},
            "data": data | {"workers": 1},
            "sampling": {"fps": 4.0},
            "stages": stages,
            "checkpoint": {"every": 1_000_000, "keep": 1},
            "parallel": {"dtype": size.dtype},
            "loader": {"workers": size.readers},
            "eval": {"metrics": dict.fromkeys(tests, "teacher_forced"), "loss": False},
        }
        return copy.deepcopy(config) | sections


def _same(*names: str) -> dict[str, str]:
    return {name: name for name in names}


def all_runs(root: Path, seeds: tuple[int, ...], size: Size, scale: float = 1.0) -> list[Run]:
    """Every run in the order in which they start: bases first, then the experiments, the longest first. scale: multiplies steps."""
    settings = [Setting(root, seed, size, scale) for seed in seeds]
    return [run for experiment in (_base, _video, _text, _tiling, _fill, _weighting) for setting in settings for run in experiment(setting)]


def _base(of: Setting) -> list[Run]:
    """Learn colours of cards in short videos, and letters on single tiles."""
    short = _same(*(f"clips_{frames}" for frames in (*SHORTEST, *LENGTHS[:2])))
    stages = [of.stage("video", "base", of.size.base_video, mixture={"weights": dict.fromkeys(short, 1.0)})]
    video = of.config("video", short, _same("still_32", "order_32"), stages)
    letters = of.config("image", _same("tiles"), _same("tiles_test"), [of.stage("image", "base", of.size.base_letters)])
    return [Run("base", "video", of.seed, video), Run("base", "letters", of.seed, letters)]


def _video(of: Setting) -> list[Run]:
    """More frames; progressive contexts against the longest alone; all lengths against long ones."""
    swept = ("still_512", "order_256", "order_512")
    held_out = _same(*swept, "still_32", "order_32")
    budget, name = of.size.video, f"s{of.size.video.tokens}"
    every = {"weights": {f"clips_{frames}": 1.0 for frames in LENGTHS}}
    long = {"weights": {f"clips_{frames}": 1.0 for frames in LENGTHS[-2:]}}
    arms = {
        "progressive": of.progressive(budget, of.size.contexts, mixture=every),
        "longest": [of.stage("video", name, budget, mixture=every)],
        "long_only": [of.stage("video", name, budget, mixture=long)],
    }
    train = _same(*(f"clips_{frames}" for frames in LENGTHS))
    return [
        Run("video", arm, of.seed, of.config("video", train, held_out, stages), f"base-video-{of.seed}", FRAMES, swept)
        for arm, stages in arms.items()
    ]


def _text(of: Setting) -> list[Run]:
    """ADS against a fixed number of frames, for which texts are cut."""
    strata = ("code_short_text", "code_long_text", "card_short_text", "card_long_text")
    budget = of.size.text
    stages = [of.stage("video", f"s{budget.tokens}", budget, mixture={"weights": {"notes": 4.0, "codes": 1.0}})]
    fixed = {"sampling": {"fps": 4.0, "strategy": "uniform", "max_frames": of.size.fixed_frames}}
    cut = {name: f"{name}_cut" for name in strata}
    arms = {
        "ads": of.config("video", _same("notes", "codes"), _same(*strata), stages),
        "fixed": of.config("video", {"notes": "notes_cut", "codes": "codes"}, cut, stages, **fixed),
    }
    return [Run("text", arm, of.seed, config, f"base-video-{of.seed}") for arm, config in arms.items()]


def _weighting(of: Setting) -> list[Run]:
    """Short and long answers, as many rows of each, by three weightings of the loss."""
    held_out = {"short": "short_test", "long": "long_test"}
    runs = []
    for weighting in ("token", "sample", "sqrt"):
        stages = [of.stage("video", "answers", of.size.weighting, sources={"short": 1.0, "long": 1.0}, loss_weighting=weighting)]
        config = of.config("video", _same("short", "long"), held_out, stages)
        runs.append(Run("weighting", weighting, of.seed, config, f"base-video-{of.seed}"))
    return runs


def _tiling(of: Setting) -> list[Run]:
    """IAP against InternVL's rule."""
    names = [f"letters_{aspect}" for aspect in ASPECTS]
    stages = [of.stage("image", f"s{of.size.tiling.tokens}", of.size.tiling)]
    internvl = {name: f"{name}_internvl" for name in names}
    arms = {
        "iap": of.config("image", _same("large"), _same(*names), stages),
        "internvl": of.config("image", {"large": "large_internvl"}, internvl, stages),
    }
    return [Run("tiling", arm, of.seed, config, f"base-letters-{of.seed}") for arm, config in arms.items()]


def _fill(of: Setting) -> list[Run]:
    """ads against ads-fill, which gives single images the tokens that are left over; from a model that finds a letter in a large image."""
    stages = [of.stage("image", f"s{of.size.fill.tokens}", of.size.fill)]
    held_out = _same("several_test")
    fill = {"sampling": {"fps": 4.0, "strategy": "ads-fill"}}
    arms = {
        "ads": of.config("image", _same("several"), held_out, stages),
        "ads-fill": of.config("image", _same("several"), held_out, stages, **fill),
    }
    return [Run("fill", arm, of.seed, config, f"tiling-iap-{of.seed}") for arm, config in arms.items()]
