"""Triton kernels run on the GPU where there is one, and in Triton's interpreter where there is none, as the tests' first conftest settles."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.interpreter import install

if not torch.cuda.is_available():
    install()


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where Triton kernels are run."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
