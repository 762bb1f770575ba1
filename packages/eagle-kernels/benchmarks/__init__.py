"""`python -m benchmarks` (from packages/eagle-kernels, on a GPU): ours against the public rivals, as milliseconds and as fraction of the roof."""
