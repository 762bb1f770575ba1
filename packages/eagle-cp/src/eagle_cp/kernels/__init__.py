"""Attention kernels over packed segments, one file each. `eagle_cp.backends` lists them and chooses."""
