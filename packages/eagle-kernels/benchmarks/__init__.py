"""`python -m benchmarks` (from packages/eagle-kernels, on a GPU): ours against public rivals, in ms and as fraction of the roof."""
