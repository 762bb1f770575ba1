"""Hypothesis on a CI machine: the same examples every time, and no complaint about a slow machine. On a GPU, cuBLAS in one order."""

import os

from hypothesis import HealthCheck, settings

settings.register_profile("ci", derandomize=True, suppress_health_check=[HealthCheck.too_slow])
if os.environ.get("CI"):
    settings.load_profile("ci")

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read before the first matmul of the process, whichever test makes it
