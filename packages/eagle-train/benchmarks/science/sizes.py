"""Models and budgets of the two sets of runs: small ones, one CPU thread each, and large ones, several at a time on one GPU."""

from __future__ import annotations

from typing import Any, NamedTuple

from letters import TILE


class Budget(NamedTuple):
    """Of a stage: tokens of a pack (which are those of a sample at most), optimizer steps, packs of a step."""

    tokens: int
    steps: int
    packs: int = 1


class Size(NamedTuple):
    """Models, precision, optimizer and budgets. width: of the language model, of heads of which `kv_heads` are keys and values.

    frame_patch: side of a patch of a frame in pixels; 2 x 2 patches are a token. readers: processes that read media, of each run.
    optimizer: by kind of model. contexts: of `video`, by stage; its steps and packs are about the longest. fixed_frames: of the arm of
    `text`.
    """

    device: str
    dtype: str
    width: int
    layers: int
    heads: int
    kv_heads: int
    mlp: int
    vision_width: int
    vision_layers: dict[str, int]
    vision_heads: int
    frame_patch: int
    optimizer: dict[str, dict[str, Any]]
    readers: int
    base_video: Budget
    base_letters: Budget
    contexts: tuple[int, ...]
    video: Budget
    text: Budget
    fixed_frames: int
    weighting: Budget
    tiling: Budget
    fill: Budget

    @property
    def model(self) -> dict[str, dict[str, Any]]:
        """Configurations of the model by kind: of videos, and of images, whose tiles are four tokens of 64 patches."""
        return {kind: self._model(kind) for kind in ("video", "image")}

    def _model(self, kind: str) -> dict[str, Any]:
        patch, ratio = (self.frame_patch, 0.5) if kind == "video" else (TILE // 8, 0.25)
        vision = {
            "hidden_size": self.vision_width,
            "intermediate_size": 3 * self.vision_width,
            "num_hidden_layers": self.vision_layers[kind],
            "num_attention_heads": self.vision_heads,
        }
        text = {
            "hidden_size": self.width,
            "intermediate_size": self.mlp,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            # About 1 / sqrt(width), as the quickstart needs it; 0.02 is made for widths in the thousands.
            "initializer_range": round(self.width**-0.5, 3),
        }
        return {
            "vision_config": vision | {"image_size": TILE, "patch_size": patch},
            "text_config": text,
            "downsample_ratio": ratio,
            "patch_initializer_range": 0.25,
        }


SMALL = Size(
    device="cpu",
    dtype="float32",
    width=64,
    layers=3,
    heads=2,
    kv_heads=2,
    mlp=160,
    vision_width=64,
    vision_layers={"video": 2, "image": 4},
    vision_heads=4,
    frame_patch=TILE // 2,  # a frame is one token
    optimizer={kind: {"optimizer": "muon", "lr": 3e-3, "betas": [0.9, 0.99]} for kind in ("video", "image")},
    readers=0,
    base_video=Budget(2048, 1100),
    base_letters=Budget(1024, 1200),
    contexts=(1408, 2816, 5632),
    video=Budget(5632, 360),
    text=Budget(512, 600, 5),
    fixed_frames=24,
    weighting=Budget(2048, 350),
    tiling=Budget(2048, 250),
    fill=Budget(192, 320, 6),
)
"""0.4 M parameters (videos, text) and 0.5 M (images)."""

LARGE = Size(
    device="cuda",
    dtype="bfloat16",
    width=768,
    layers=8,
    heads=12,
    kv_heads=4,
    mlp=2048,
    vision_width=192,
    vision_layers={"video": 2, "image": 4},
    vision_heads=3,
    frame_patch=TILE // 4,  # a frame is four tokens
    # At 1e-3 bases learned nothing in 600 steps; of letters four of four were right in 0.88 at 4e-4, in 0.97 at 2e-4.
    optimizer={
        "video": {"optimizer": "adamw", "lr": 4e-4, "betas": [0.9, 0.95]},
        "image": {"optimizer": "adamw", "lr": 2e-4, "betas": [0.9, 0.95]},
    },
    readers=2,
    base_video=Budget(4096, 700),
    base_letters=Budget(4096, 800),
    contexts=(1728, 3456, 6912),
    video=Budget(6912, 300),
    text=Budget(640, 300, 8),
    fixed_frames=30,
    weighting=Budget(4096, 150),
    tiling=Budget(4096, 250),
    fill=Budget(192, 300, 6),
)
"""About 53 M parameters."""

SIZES = {"small": SMALL, "large": LARGE}


def trial(size: Size) -> Size:
    """The same with a model of a few thousand parameters, on a CPU: whether everything works."""
    return size._replace(device="cpu", dtype="float32", width=32, layers=1, heads=2, kv_heads=1, mlp=64, vision_width=32, vision_heads=2)
