"""What was measured of a model's layers, as JSON: written as soon as it is known, and enough to allocate anew for any budget.

What was chosen, and how loss falls with size, stands in the same file for people and plots; only the measurement is ever read back.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Self

from quantkit.checkpoint.disk import disk_errors, write_atomically
from quantkit.checkpoint.output import partial_folder
from quantkit.errors import UsageError

ALLOCATION_FILE, PICTURE_FILE = "quantkit_allocation.json", "quantkit_allocation.png"
USUAL_FACTOR = 1.3
"""Measured over predicted on two models, three calibration draws and four sizes each: 1.11 to 1.39."""
CAUTION = 1.02
_KIND, _VERSION = "quantkit allocation", 1


@dataclass(frozen=True, slots=True)
class Trial:
    """A model that was made from a prediction: nats a token as predicted, and as measured on so many held-out tokens; and by which roundings."""

    linear_bpw: float
    predicted: float
    measured: float
    tokens: int = 0
    roundings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Measurement:
    """Losses of every layer's candidates.

    Attributes:
        source: the model's name; `fingerprint` tells its weights.
        made_by: what the losses depend on beside the model: roundings, rows, device.
        calibration: the account of the rows.
        tokens: how many of them were measured on.
        losses: nats a token by layer and scheme.
        trials: predictions that were put to the test.
    """

    source: str
    fingerprint: str
    made_by: dict[str, Any]
    calibration: str
    tokens: int
    losses: dict[str, dict[str, float]]
    trials: tuple[Trial, ...] = ()

    def factor(self, roundings: tuple[str, ...]) -> float:
        """What predictions are multiplied by for models of these roundings: a little more than what the trial on most tokens came to, the last of
        several; and what many models did where there is none."""
        alike = [trial for trial in self.trials if trial.roundings == roundings and trial.predicted > 0]
        if not alike:
            return USUAL_FACTOR
        trial = max(reversed(alike), key=lambda each: each.tokens)
        return CAUTION * trial.measured / trial.predicted

    def tried(self, trial: Trial) -> Measurement:
        """With one more trial; what it predicted is without a factor."""
        return replace(self, trials=(*self.trials, trial))

    def write(self, path: Path, outcome: Mapping[str, Any] | None = None) -> None:
        """Atomically; `outcome` is added for people and plots."""
        content = {"kind": _KIND, "version": _VERSION} | asdict(self) | {"outcome": dict(outcome or {})}
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, (json.dumps(content, indent=1) + "\n").encode())

    @classmethod
    def read(cls, path: Path) -> Self:
        """A measurement from its file.

        Raises:
            UsageError: it is unreadable or no such file.
        """
        try:
            content = json.loads(path.read_bytes())
            if (content["kind"], content["version"]) != (_KIND, _VERSION):
                raise ValueError(f"it is {content['kind']!r} of version {content['version']!r}")
            losses = {str(layer): {str(scheme): _loss(value) for scheme, value in by.items()} for layer, by in content["losses"].items()}
            trials = tuple(_trial(**trial) for trial in content["trials"])
            if not isinstance(content["made_by"], dict):
                raise ValueError(f"made_by is {content['made_by']!r}")
            facts = {name: content[name] for name in ("source", "fingerprint", "made_by", "calibration", "tokens")}
            return cls(**facts, losses=losses, trials=trials)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UsageError(f"{path} is no allocation that quantkit wrote ({error}); give another file, or a new name to measure") from error


def _trial(linear_bpw: Any, predicted: Any, measured: Any, tokens: Any = 0, roundings: Any = ()) -> Trial:
    return Trial(_loss(linear_bpw), _loss(predicted), _loss(measured), int(tokens), tuple(map(str, roundings)))


def _loss(value: Any) -> float:
    loss = float(value)
    if not (math.isfinite(loss) and loss >= 0):
        raise ValueError(f"a loss is {value}")
    return loss


def allocation_path(given: str) -> Path:
    """The file of a path that may be the folder of an earlier conversion."""
    path = Path(given).expanduser()
    return path / ALLOCATION_FILE if path.is_dir() else path


def path_beside(out: Path) -> Path:
    """Where the measurement of a conversion that is under way is kept when the user named no file."""
    partial = partial_folder(out)
    return partial.with_name(partial.name.removesuffix(".partial") + ".allocation.json")
