"""Products of float32 matrices on a CPU, by the faster of the libraries that torch has for them.

MKL, which torch takes, uses AVX-512 on Intel's processors alone. oneDNN uses it on any, and is asked only when it is allowed to round factors to
bfloat16. It does so where a processor has instructions for such products as a whole (AMX); whether it does here is tried.
"""

from __future__ import annotations

import platform
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch

_EXACT = 1e-5
"""The largest relative error of a float32 product. Factors of bfloat16 give 2e-3."""


@contextmanager
def fast_products() -> Iterator[None]:
    """Within it, products are as exact as ever and made by `product_library`. Also a decorator.

    Torch's older `get_float32_matmul_precision` refuses to answer within it, as with every setting of the newer kind.
    """
    settings = torch.backends.mkldnn.matmul
    before = settings.fp32_precision
    settings.fp32_precision = "bf16" if product_library() == "oneDNN" else before
    try:
        yield
    finally:
        settings.fp32_precision = before


@cache
def product_library() -> str:
    """"oneDNN" where it is faster than torch's choice and rounds as float32 does, else "torch's own"."""
    has_both = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
    is_wide = torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    return "oneDNN" if has_both and is_wide and _vendor() != "GenuineIntel" and _is_exact() else "torch's own"


def _vendor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("vendor_id"))
    return next(named, platform.processor().rpartition(" ")[2])


def _is_exact() -> bool:
    settings, generator = torch.backends.mkldnn.matmul, torch.Generator().manual_seed(0)
    a, b = torch.randn(256, 1024, generator=generator), torch.randn(1024, 256, generator=generator)
    before = settings.fp32_precision
    settings.fp32_precision = "bf16"
    try:
        product = a @ b
    finally:
        settings.fp32_precision = before
    exact = a.double() @ b.double()
    return bool((product - exact).norm() <= _EXACT * exact.norm())
