"""What an unfinished conversion has finished, so that a killed run goes on where it stopped. One JSON file, replaced as a whole.

The ledger is the only witness: a shard has its full size from the start, so nothing but an entry here says which tensors in it are real.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Self

from quantkit.checkpoint.disk import write_atomically
from quantkit.errors import OutputError

LEDGER_FILE = "ledger.json"

_ABSENT = object()
_SHOWN = 120


class Ledger:
    """The finished units (blocks, mostly) of one conversion, each with an entry of the caller's. Made by `Ledger.open`.

    Every `record` rewrites the file, so units should be counted in hundreds. Values pass through JSON: tuples come back as lists,
    floats come back bit for bit.
    """

    def __init__(self, path: Path, identity: dict[str, Any], entries: dict[str, dict[str, Any]]) -> None:
        self.path = path
        self._identity = identity
        self._entries = entries

    @classmethod
    def open(cls, folder: Path, identity: dict[str, Any], *, fresh: bool = False) -> Self:
        """The ledger of a partial output folder; empty where none was written.

        Args:
            identity: what the output depends on: source, recipe, options, versions. JSON values only.
            fresh: forget what an earlier run finished.

        Raises:
            OutputError: the stored identity is another one, or the file is unreadable.
        """
        path = Path(folder) / LEDGER_FILE
        identity = _through_json(identity)
        if fresh:
            path.unlink(missing_ok=True)
        if not path.exists():
            return cls(path, identity, {})
        stored, entries = _load(path)
        _require_same(path, stored, identity)
        return cls(path, identity, entries)

    @property
    def units(self) -> list[str]:
        """The finished units, in the order in which they were recorded."""
        return list(self._entries)

    def is_done(self, unit: str) -> bool:
        return unit in self._entries

    def entry(self, unit: str) -> dict[str, Any]:
        """What was recorded with a finished unit."""
        return self._entries[unit]

    def record(self, unit: str, entry: dict[str, Any]) -> None:
        """Vouch for a unit, durably. Only after its tensors are durable themselves: `CheckpointWriter.sync` comes first.

        Raises:
            OutputError: the disk refuses; the ledger is then as it was before.
        """
        entries = {**self._entries, unit: _through_json(entry)}
        write_atomically(self.path, json.dumps({"identity": self._identity, "units": entries}, indent=1).encode())
        self._entries = entries


def _through_json(value: dict[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(value))


def _load(path: Path) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    try:
        content = json.loads(path.read_bytes())
        identity, units = content["identity"], content["units"]
        if not isinstance(identity, dict) or not isinstance(units, dict):
            raise ValueError("it has no table of units")
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise OutputError(f"{path}, which says what the unfinished run has done, is unreadable ({error}); --fresh starts over") from error
    return identity, units


def _require_same(path: Path, stored: dict[str, Any], given: dict[str, Any]) -> None:
    keys = [key for key in {**stored, **given} if stored.get(key, _ABSENT) != given.get(key, _ABSENT)]
    if keys:
        changes = "; ".join(f"{key} was {_show(stored, key)} and is now {_show(given, key)}" for key in keys)
        raise OutputError(
            f"{path.parent} holds the unfinished work of another run: {changes}. Go back to the old options to finish it, or discard it with --fresh"
        )


def _show(identity: dict[str, Any], key: str) -> str:
    if key not in identity:
        return "not set"
    text = json.dumps(identity[key], ensure_ascii=False)
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "..."
