"""A torch profile of some steps: `eagle train --profile STEPS`."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch

logger = logging.getLogger(__name__)

SKIPPED = 2
"""Steps before the profile: kernels are compiled and memory is allocated in the first one."""


class StepProfile:
    """`with StepProfile(folder, steps) as profile`, and `profile.step()` after every step: profiles `steps` steps after the first `SKIPPED`
    ones, and writes `trace.json.gz` (chrome://tracing, Perfetto) and `operators.txt` to `folder`."""

    def __init__(self, folder: Path, steps: int) -> None:
        self.folder = folder
        activities = [torch.profiler.ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        self._sort = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
        self._made = False
        self._profile = torch.profiler.profile(
            activities=activities,
            schedule=torch.profiler.schedule(skip_first=SKIPPED - 1, wait=0, warmup=1, active=steps, repeat=1),
            on_trace_ready=self._write,
            profile_memory=True,
        )

    def step(self) -> None:
        """A step is over."""
        self._profile.step()

    def __enter__(self) -> StepProfile:
        self._profile.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._profile.__exit__(*error)
        if not self._made and error[0] is None:
            logger.warning("no profile was written: this command made fewer than %d steps", SKIPPED + 1)

    def _write(self, profile: torch.profiler.profile) -> None:
        self._made = True
        self.folder.mkdir(parents=True, exist_ok=True)
        profile.export_chrome_trace(str(self.folder / "trace.json.gz"))
        table = profile.key_averages().table(sort_by=self._sort, row_limit=60)
        (self.folder / "operators.txt").write_text(table, encoding="utf-8")
        logger.info("profile: %s (open it in https://ui.perfetto.dev), %s", self.folder / "trace.json.gz", self.folder / "operators.txt")
