"""Float32 products by the faster library: as exact as torch's own choice, for as long as asked, and by MKL on Intel's processors."""

from __future__ import annotations

import pytest
import torch

from quantkit.core import products


@pytest.fixture
def anew():
    """The choice made again, now and after the test."""
    products.product_library.cache_clear()
    yield
    products.product_library.cache_clear()


@pytest.mark.parametrize("shape", [(1, 64, 64), (64, 192, 512), (300, 1024, 257), (2048, 256, 768)])
def test_products_are_as_exact_as_float32_allows(shape: tuple[int, int, int]) -> None:
    m, k, n = shape
    generator = torch.Generator().manual_seed(1)
    x, weight = torch.randn(m, k, generator=generator), torch.randn(n, k, generator=generator)

    with products.fast_products():
        given, square = torch.nn.functional.linear(x, weight), torch.zeros(k, k).addmm_(x.T, x)

    for found, exact in ((given, x.double() @ weight.double().T), (square, x.double().T @ x.double())):
        assert (found - exact).norm() < 2e-6 * exact.norm()


def test_the_setting_is_as_it_was_afterwards_whatever_happens(anew: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "product_library", lambda: "oneDNN")
    before = torch.backends.mkldnn.matmul.fp32_precision

    with pytest.raises(ZeroDivisionError), products.fast_products():
        assert torch.backends.mkldnn.matmul.fp32_precision == "bf16"
        raise ZeroDivisionError

    assert torch.backends.mkldnn.matmul.fp32_precision == before


@pytest.mark.parametrize(
    ("vendor", "instructions", "is_exact", "library"),
    [
        ("AuthenticAMD", "AVX512", True, "oneDNN"), ("AuthenticAMD", "AVX512", False, "torch's own"), ("AuthenticAMD", "AVX2", True, "torch's own"),
        ("GenuineIntel", "AVX512", True, "torch's own"),
    ],
)  # fmt: skip
def test_mkl_keeps_intels_processors_and_those_that_would_round_to_bfloat16(
    vendor: str, instructions: str, is_exact: bool, library: str, anew: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "_vendor", lambda: vendor)
    monkeypatch.setattr(products, "_is_exact", lambda: is_exact)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: instructions)
    for backend in (torch.backends.mkl, torch.backends.mkldnn):
        monkeypatch.setattr(backend, "is_available", lambda: True)

    assert products.product_library() == library


def test_factors_rounded_to_bfloat16_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def rounded(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return torch.mm(a.bfloat16().to(a.dtype) if a.dtype == torch.float32 else a, b)

    monkeypatch.setattr(torch.Tensor, "__matmul__", rounded)

    assert not products._is_exact()
