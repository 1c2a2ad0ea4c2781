"""Kernels for processors: C++ compiled when first used, and the operators of torch that are fast there."""
