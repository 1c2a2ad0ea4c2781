"""The ledger remembers exactly, refuses another run's work, and is never half there."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from quantkit.checkpoint.ledger import Ledger
from quantkit.errors import OutputError

_IDENTITY = {"source": "org/name", "seed": 0, "dampening": 0.01, "layers": ("a", "b")}


def test_a_ledger_is_empty_until_something_is_recorded(tmp_path: Path) -> None:
    ledger = Ledger.open(tmp_path, _IDENTITY)
    assert ledger.units == [] and not ledger.is_done("block 0")
    assert list(tmp_path.iterdir()) == []


def test_a_later_run_finds_what_was_recorded_in_its_order(tmp_path: Path) -> None:
    ledger = Ledger.open(tmp_path, _IDENTITY)
    ledger.record("block 1", {"names": ("x", "y"), "error": 0.5})
    ledger.record("block 0", {})
    found = Ledger.open(tmp_path, _IDENTITY)
    assert found.units == ["block 1", "block 0"] and found.is_done("block 0") and not found.is_done("block 2")
    assert found.entry("block 1") == ledger.entry("block 1") == {"names": ["x", "y"], "error": 0.5}
    assert [path.name for path in tmp_path.iterdir()] == ["ledger.json"]


@pytest.mark.parametrize("value", [0.1 + 0.2, 1e-320, 1.7976931348623157e308, -0.0, float("inf"), 2**80, "ü\n\ud800"], ids=repr)
def test_values_come_back_bit_for_bit(tmp_path: Path, value: object) -> None:
    Ledger.open(tmp_path, {}).record("unit", {"value": value})
    found = Ledger.open(tmp_path, {}).entry("unit")["value"]
    assert found == value and repr(found) == repr(value)


def test_other_options_are_refused_by_name_and_value(tmp_path: Path) -> None:
    Ledger.open(tmp_path, _IDENTITY).record("block 0", {})
    with pytest.raises(OutputError) as caught:
        Ledger.open(tmp_path, {**_IDENTITY, "seed": 1, "extra": None} | {"dampening": 0.01})
    message = str(caught.value)
    assert "seed was 0 and is now 1" in message and "extra was not set and is now null" in message and "--fresh" in message
    assert "dampening" not in message and "layers" not in message
    assert Ledger.open(tmp_path, _IDENTITY).units == ["block 0"], "a refused run takes nothing away"


def test_fresh_forgets_the_work_of_another_run(tmp_path: Path) -> None:
    Ledger.open(tmp_path, _IDENTITY).record("block 0", {})
    assert Ledger.open(tmp_path, {"seed": 1}, fresh=True).units == []
    assert Ledger.open(tmp_path, _IDENTITY).units == []


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "{}", '{"identity": {}, "units": []}'], ids=["empty", "cut off", "list", "no keys", "units a list"]
)
def test_unreadable_ledger_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "ledger.json").write_text(content)
    with pytest.raises(OutputError, match=r"ledger\.json.*--fresh"):
        Ledger.open(tmp_path, {})


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_failed_record_leaves_the_ledger_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    ledger = Ledger.open(tmp_path, _IDENTITY)
    ledger.record("block 0", {})

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OutputError, match="free some space"):
        patch.setattr(os, call, fail)
        ledger.record("block 1", {})
    assert ledger.units == Ledger.open(tmp_path, _IDENTITY).units == ["block 0"]
