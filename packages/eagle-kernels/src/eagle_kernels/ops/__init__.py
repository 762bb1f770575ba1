"""The operators, one folder each: `function.py` (public functions, checks, autograd), `reference.py` (plain torch), `kernel.py` (Triton).

A `kernel.py` is imported only when one of its kernels is about to run, so the package imports without Triton.
"""
