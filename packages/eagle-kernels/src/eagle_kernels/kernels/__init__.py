"""The Triton kernels and their launches, one file an operator; imported only when a kernel is about to run."""
