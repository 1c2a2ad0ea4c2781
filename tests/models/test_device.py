"""A device is looked for before any work."""

from __future__ import annotations

from pathlib import Path

import pytest

from quantkit.conversion.verify import VerifyOptions, verify
from quantkit.errors import UsageError
from quantkit.evaluation.evaluate import EvaluationOptions, evaluate
from quantkit.models.device import find_device


def test_the_cpu_is_found() -> None:
    assert find_device("cpu").type == "cpu"


@pytest.mark.parametrize("name", ["cuda:99", "gpu", "meta"])
def test_an_absent_device_is_refused_before_the_model_is_looked_for(name: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=f"device '{name}' cannot be used here .*; use auto or cpu"):
        find_device(name)
    with pytest.raises(UsageError, match=f"device '{name}'"):
        verify(tmp_path / "nowhere", options=VerifyOptions(device=name))
    with pytest.raises(UsageError, match=f"device '{name}'"):
        evaluate(tmp_path / "nowhere", options=EvaluationOptions(device=name))
