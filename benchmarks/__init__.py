"""Benchmark harness of all packages: timing, ceilings of the machine, environment, rivals, results. See README.md."""
