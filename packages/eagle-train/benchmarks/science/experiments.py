"""The arms: configurations of eagle that differ in one respect, trained on the same number of tokens.

Arms start from small base models that know the tasks at short contexts (one per seed and kind of media), as the paper's training starts
from a model that knows images. Only the arms of `weighting` start from random weights.
"""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any, NamedTuple

from data import FIXED_FRAMES, LENGTHS
from digits import ASPECTS

FRAMES = (16, 32, 64, 128, 256, 512)
WIDTH, LAYERS, VISION_LAYERS = 128, 4, 3


class Run(NamedTuple):
    """One training and its evaluation. after: name of the run whose model it starts from. frames: evaluated at these numbers of frames."""

    experiment: str
    arm: str
    seed: int
    config: dict[str, Any]
    after: str | None = None
    frames: tuple[int, ...] = ()

    @property
    def name(self) -> str:
        """Of the folder of the run."""
        return f"{self.experiment}-{self.arm}-{self.seed}"


def model(patch: int) -> dict[str, Any]:
    """A model of about 1.5 M parameters; 64-pixel tiles of (64 / patch / 2)^2 tokens."""
    vision = {"hidden_size": WIDTH, "intermediate_size": 3 * WIDTH, "num_hidden_layers": VISION_LAYERS, "num_attention_heads": WIDTH // 32}
    text = {
        "hidden_size": WIDTH,
        "intermediate_size": 5 * WIDTH // 2,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": WIDTH // 64,
        "num_key_value_heads": WIDTH // 64,
        "head_dim": 64,
        # About 1 / sqrt(width), as the quickstart needs it; 0.02 is made for widths in the thousands.
        "initializer_range": round(1 / math.sqrt(WIDTH), 3),
    }
    return {
        "vision_config": vision | {"image_size": 64, "patch_size": patch},
        "text_config": text,
        "patch_initializer_range": 0.25,
    }


def stage(name: str, tokens: int, steps: int, packs: int = 1, **more: Any) -> dict[str, Any]:
    """A stage with the optimizer of the quickstart."""
    common = {"loss_weighting": "token", "optimizer": "muon", "lr": 3e-3, "betas": [0.9, 0.95], "schedule": "cosine"}
    return common | {"name": name, "max_tokens": tokens, "steps": steps, "packs_per_step": packs, "warmup_ratio": 0.04} | more


def progressive(steps: int, contexts: tuple[int, ...]) -> list[dict[str, Any]]:
    """Equal tokens at each context; every step has the tokens of the longest one. One schedule of the learning rate over all stages."""
    share = steps // len(contexts)
    stages = []
    for number, tokens in enumerate(contexts):
        last = number == len(contexts) - 1
        shape = {"schedule": "cosine"} if last else {"schedule": "constant"}
        warm = {"warmup_ratio": 0.04 * len(contexts) if number == 0 else 0.0, "carry_optimizer": number > 0}
        stages.append(stage(f"s{tokens}", tokens, share, contexts[-1] // tokens, **shape, **warm))
    return stages


def _config(
    root: Path, patch: int, train: dict[str, str], held_out: dict[str, str], stages: list[dict[str, Any]], dtype: str, **sections: Any
) -> dict[str, Any]:
    """train, held_out: files by source name."""
    sources = {name: {"annotation": str(root / f"{file}.jsonl")} for name, file in train.items()}
    tests = {name: {"annotation": str(root / f"{file}.jsonl")} for name, file in held_out.items()}
    facts = "-".join(sorted({*train.values()}))[:150]
    config = {
        "model": {"preset": "tiny", "tokenizer": str(root / "tokenizer"), "activations": "keep", "overrides": model(patch)},
        "data": {"sources": sources, "eval_sources": tests, "facts": str(root / "facts" / facts), "verify": "header", "workers": 1},
        "sampling": {"fps": 4.0},
        "stages": stages,
        "checkpoint": {"every": 1_000_000, "keep": 1},
        "parallel": {"dtype": dtype},
        "loader": {"workers": 2},
        "eval": {"metrics": dict.fromkeys(tests, "teacher_forced"), "loss": False},
    }
    return copy.deepcopy(config) | sections


def _same(*names: str) -> dict[str, str]:
    return {name: name for name in names}


def _shared(lengths: tuple[int, ...]) -> dict[str, float]:
    """Clips of all lengths with the same number of tokens."""
    return {f"clips_{frames}": 1.0 for frames in lengths}


def all_runs(root: Path, seeds: tuple[int, ...], scale: float, dtype: str) -> list[Run]:
    """Every run, seed by seed, bases first. scale: multiplies steps."""

    def steps(count: int) -> int:
        return max(3, round(count * scale))

    runs: list[Run] = []
    for seed in seeds:
        runs += _bases(root, seed, steps, dtype)
    for seed in seeds:
        runs += _video(root, seed, steps, dtype)
        runs += _text(root, seed, steps, dtype)
        runs += _tiles(root, seed, steps, dtype)
    for seed in seeds:
        runs += _weighting(root, seed, steps, dtype)
    return runs


def _bases(root: Path, seed: int, steps: Any, dtype: str) -> list[Run]:
    short = ("clips_4", "clips_8", "clips_16", "clips_32", "clips_64")
    mixture = {"mixture": {"weights": {"clips_4": 1.0, "clips_8": 1.0, "clips_16": 2.0, "clips_32": 2.0, "clips_64": 1.0, "cards": 0.2}}}
    flat = {"schedule": "constant", "sources": {"cards": 1.0}}
    stages = [stage("cards", 4096, steps(100), **flat), stage("base", 4096, steps(1400), **mixture | {"warmup_ratio": 0.0})]
    video = _config(root, 16, _same("cards", *short), _same("still_32", "order_32"), stages, dtype)
    image = _config(root, 8, _same("tile"), _same(*(f"digits_{one}" for one in ASPECTS)), [stage("base", 8192, steps(1000))], dtype)
    return [Run("base", "video", seed, video), Run("base", "image", seed, image)]


def _video(root: Path, seed: int, steps: Any, dtype: str) -> list[Run]:
    """More frames; progressive contexts against the longest alone; all lengths against long ones."""
    held_out = _same("still_512", "first_512", "order_512", "still_32", "order_32")
    contexts, count = (2048, 4096, 8192), steps(600)
    every = {"mixture": {"weights": _shared(LENGTHS)}}
    long = {"mixture": {"weights": _shared(LENGTHS[-2:])}}
    arms = {
        "progressive": [one | every for one in progressive(count, contexts)],
        "longest": [stage("s8192", 8192, count, **every)],
        "long_only": [stage("s8192", 8192, count, **long)],
    }
    train = _same(*(f"clips_{frames}" for frames in LENGTHS))
    return [
        Run("video", arm, seed, _config(root, 16, train, held_out, stages, dtype), f"base-video-{seed}", FRAMES)
        for arm, stages in arms.items()
    ]


def _text(root: Path, seed: int, steps: Any, dtype: str) -> list[Run]:
    """ADS against a fixed number of frames, for which texts are cut."""
    strata = ("code_short_text", "code_long_text", "card_short_text", "card_long_text")
    stages = [stage("s2048", 2048, steps(600), 2)]
    fixed = {"sampling": {"fps": 4.0, "strategy": "uniform", "max_frames": FIXED_FRAMES}}
    arms = {
        "ads": _config(root, 16, _same("notes"), _same(*strata), stages, dtype),
        "fixed": _config(root, 16, {"notes": "notes_cut"}, {name: f"{name}_cut" for name in strata}, stages, dtype, **fixed),
    }
    return [Run("text", arm, seed, config, f"base-video-{seed}") for arm, config in arms.items()]


def _tiles(root: Path, seed: int, steps: Any, dtype: str) -> list[Run]:
    """IAP against InternVL's rule; ads against ads-fill."""
    names = [f"digits_{aspect}" for aspect in ASPECTS]
    stages = [stage("s4096", 4096, steps(800))]
    several = [stage("s640", 640, steps(500), 3)]
    internvl = {name: f"{name}_internvl" for name in names}
    fill = {"sampling": {"fps": 4.0, "strategy": "ads-fill"}}
    arms = {
        ("tiling", "iap"): _config(root, 8, _same("large"), _same(*names), stages, dtype),
        ("tiling", "internvl"): _config(root, 8, {"large": "large_internvl"}, internvl, stages, dtype),
        ("fill", "ads"): _config(root, 8, _same("several"), _same("several_test"), several, dtype),
        ("fill", "ads-fill"): _config(root, 8, _same("several"), _same("several_test"), several, dtype, **fill),
    }
    return [Run(experiment, arm, seed, config, f"base-image-{seed}") for (experiment, arm), config in arms.items()]


def _weighting(root: Path, seed: int, steps: Any, dtype: str) -> list[Run]:
    """Short and long answers, as many rows of each, by three weightings of the loss; from random weights."""
    held_out = {"short": "short_test", "long": "long_test"}
    runs = []
    for weighting in ("token", "sample", "sqrt"):
        cards = stage("cards", 4096, steps(100), schedule="constant", sources={"cards": 1.0})
        answers = stage("answers", 4096, steps(1100), warmup_ratio=0.0, sources={"short": 1.0, "long": 1.0}, loss_weighting=weighting)
        config = _config(root, 16, _same("cards", "short", "long"), held_out, [cards, answers], dtype)
        runs.append(Run("weighting", weighting, seed, config))
    return runs
