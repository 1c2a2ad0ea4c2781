"""Triton kernels and their launchers. `reference.py` states what each computes; `ahead_of_time.py` compiles all that are shipped without a GPU."""
