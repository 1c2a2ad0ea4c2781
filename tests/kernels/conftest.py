"""Triton kernels run on the GPU where there is one, and in Triton's interpreter where there is none; that is settled before their import."""

from __future__ import annotations

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    from tests.kernels.interpreter import install

    install()


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where Triton kernels are run."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
