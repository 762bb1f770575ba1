"""The arms: configurations of eagle that differ in one respect, trained on the same number of tokens.

Every run is one CPU thread's work of a few minutes. As the paper's training starts from a model that knows images, arms start from small
models, two per seed, that know letters on single tiles and cards in short videos.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from data import FIXED_FRAMES, LENGTHS, SHORTEST
from letters import ASPECTS, TILE

FRAMES = (16, 32, 64, 128, 256, 512)
WIDTH, LAYERS = 64, 3


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


def model(kind: str) -> dict[str, Any]:
    """A model of about 0.3 M parameters. Frames are one token of four patches; tiles of images four tokens of 64 patches."""
    patch, ratio, layers = {"video": (TILE // 2, 0.5, 2), "image": (TILE // 8, 0.25, 4)}[kind]
    vision = {"hidden_size": WIDTH, "intermediate_size": 3 * WIDTH, "num_hidden_layers": layers, "num_attention_heads": 4}
    text = {
        "hidden_size": WIDTH,
        "intermediate_size": 5 * WIDTH // 2,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        # About 1 / sqrt(width), as the quickstart needs it; 0.02 is made for widths in the thousands.
        "initializer_range": round(1 / math.sqrt(WIDTH), 3),
    }
    return {
        "vision_config": vision | {"image_size": TILE, "patch_size": patch},
        "text_config": text,
        "downsample_ratio": ratio,
        "patch_initializer_range": 0.25,
    }


def stage(name: str, tokens: int, steps: int, packs: int = 1, **more: Any) -> dict[str, Any]:
    """A stage with the optimizer of the quickstart."""
    common = {
        "loss_weighting": "token",
        "optimizer": "muon",
        "lr": 3e-3,
        "betas": [0.9, 0.99],
        "schedule": "cosine",
        "final_lr_ratio": 0.02,
    }
    return common | {"name": name, "max_tokens": tokens, "steps": steps, "packs_per_step": packs, "warmup_ratio": 0.05} | more


def progressive(steps: int, contexts: tuple[int, ...]) -> list[dict[str, Any]]:
    """Equal tokens at each context; every step has the tokens of the longest one. One schedule of the learning rate over all stages."""
    share = steps // len(contexts)
    stages = []
    for number, tokens in enumerate(contexts):
        last = number == len(contexts) - 1
        shape = {} if last else {"schedule": "constant", "final_lr_ratio": 0.0}
        warm = {"warmup_ratio": 0.05 * len(contexts) if number == 0 else 0.0, "carry_optimizer": number > 0}
        stages.append(stage(f"s{tokens}", tokens, share, contexts[-1] // tokens, **shape, **warm))
    return stages


def _config(
    root: Path, kind: str, train: dict[str, str], held_out: dict[str, str], stages: list[dict[str, Any]], **sections: Any
) -> dict[str, Any]:
    """kind: of the model. train, held_out: files by source name."""
    sources = {name: {"annotation": str(root / f"{file}.jsonl")} for name, file in train.items()}
    tests = {name: {"annotation": str(root / f"{file}.jsonl")} for name, file in held_out.items()}
    facts = "-".join(sorted({*train.values()}))[:150]
    config = {
        "model": {"preset": "tiny", "tokenizer": str(root / "tokenizer"), "activations": "keep", "overrides": model(kind)},
        "data": {"sources": sources, "eval_sources": tests, "facts": str(root / "facts" / facts), "verify": "header", "workers": 1},
        "sampling": {"fps": 4.0},
        "stages": stages,
        "checkpoint": {"every": 1_000_000, "keep": 1},
        "parallel": {"dtype": "float32"},
        "loader": {"workers": 0},
        "eval": {"metrics": dict.fromkeys(tests, "teacher_forced"), "loss": False},
    }
    return copy.deepcopy(config) | sections


def _same(*names: str) -> dict[str, str]:
    return {name: name for name in names}


def all_runs(root: Path, seeds: tuple[int, ...], scale: float) -> list[Run]:
    """Every run in the order in which they start: bases first, then seed by seed. scale: multiplies steps."""

    def steps(count: int) -> int:
        return max(3, round(count * scale))

    runs = [run for seed in seeds for run in _base(root, seed, steps)]
    for seed in seeds:
        for experiment in (_video, _text, _weighting, _tiles):
            runs += experiment(root, seed, steps)
    return runs


Steps = Callable[[int], int]


def _video(root: Path, seed: int, steps: Steps) -> list[Run]:
    """More frames; progressive contexts against the longest alone; all lengths against long ones."""
    swept = ("still_512", "order_256", "order_512")
    held_out = _same(*swept, "still_32", "order_32")
    contexts, count = (1408, 2816, 5632), steps(360)
    every = {"weights": {f"clips_{frames}": 1.0 for frames in LENGTHS}}
    long = {"weights": {f"clips_{frames}": 1.0 for frames in LENGTHS[-2:]}}
    arms = {
        "progressive": [one | {"mixture": every} for one in progressive(count, contexts)],
        "longest": [stage("s5632", contexts[-1], count, mixture=every)],
        "long_only": [stage("s5632", contexts[-1], count, mixture=long)],
    }
    train = _same(*(f"clips_{frames}" for frames in LENGTHS))
    return [
        Run("video", arm, seed, _config(root, "video", train, held_out, stages), f"base-video-{seed}", FRAMES, swept)
        for arm, stages in arms.items()
    ]


def _text(root: Path, seed: int, steps: Steps) -> list[Run]:
    """ADS against a fixed number of frames, for which texts are cut."""
    strata = ("code_short_text", "code_long_text", "card_short_text", "card_long_text")
    stages = [stage("s512", 512, steps(600), 5, mixture={"weights": {"notes": 4.0, "codes": 1.0}})]
    fixed = {"sampling": {"fps": 4.0, "strategy": "uniform", "max_frames": FIXED_FRAMES}}
    cut = {name: f"{name}_cut" for name in strata}
    arms = {
        "ads": _config(root, "video", _same("notes", "codes"), _same(*strata), stages),
        "fixed": _config(root, "video", {"notes": "notes_cut", "codes": "codes"}, cut, stages, **fixed),
    }
    return [Run("text", arm, seed, config, f"base-video-{seed}") for arm, config in arms.items()]


def _weighting(root: Path, seed: int, steps: Steps) -> list[Run]:
    """Short and long answers, as many rows of each, by three weightings of the loss."""
    held_out = {"short": "short_test", "long": "long_test"}
    runs = []
    for weighting in ("token", "sample", "sqrt"):
        stages = [stage("answers", 2048, steps(350), sources={"short": 1.0, "long": 1.0}, loss_weighting=weighting)]
        config = _config(root, "video", _same("short", "long"), held_out, stages)
        runs.append(Run("weighting", weighting, seed, config, f"base-video-{seed}"))
    return runs


def _base(root: Path, seed: int, steps: Steps) -> list[Run]:
    """Learn colours of cards in short videos, and letters on single tiles."""
    short = _same(*(f"clips_{frames}" for frames in (*SHORTEST, *LENGTHS[:2])))
    video = _config(
        root,
        "video",
        short,
        _same("still_32", "order_32"),
        [stage("base", 2048, steps(1100), mixture={"weights": dict.fromkeys(short, 1.0)})],
    )
    letters = _config(root, "image", _same("tiles"), _same("tiles_test"), [stage("base", 1024, steps(1200))])
    return [Run("base", "video", seed, video), Run("base", "letters", seed, letters)]


def _tiles(root: Path, seed: int, steps: Steps) -> list[Run]:
    """IAP against InternVL's rule; ads against ads-fill."""
    names = [f"letters_{aspect}" for aspect in ASPECTS]
    stages = [stage("s2048", 2048, steps(250))]
    several = [stage("s192", 192, steps(320), 8)]
    internvl = {name: f"{name}_internvl" for name in names}
    fill = {"sampling": {"fps": 4.0, "strategy": "ads-fill"}}
    arms = {
        ("tiling", "iap"): _config(root, "image", _same("large"), _same(*names), stages),
        ("tiling", "internvl"): _config(root, "image", {"large": "large_internvl"}, internvl, stages),
        ("fill", "ads"): _config(root, "image", _same("several"), _same("several_test"), several),
        ("fill", "ads-fill"): _config(root, "image", _same("several"), _same("several_test"), several, **fill),
    }
    return [Run(experiment, arm, seed, config, f"base-letters-{seed}") for (experiment, arm), config in arms.items()]
