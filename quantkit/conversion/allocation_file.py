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
    """A model that was made from a prediction: nats a token as predicted, and as measured on held-out rows."""

    linear_bpw: float
    predicted: float
    measured: float


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

    @property
    def factor(self) -> float:
        """What predictions are multiplied by: a little more than what the last trial came to, and what many models did where there is none."""
        if not self.trials or self.trials[-1].predicted <= 0:
            return USUAL_FACTOR
        return CAUTION * self.trials[-1].measured / self.trials[-1].predicted

    def tried(self, linear_bpw: float, predicted: float, measured: float) -> Measurement:
        """With one more trial; `predicted` is without a factor."""
        return replace(self, trials=(*self.trials, Trial(linear_bpw, predicted, measured)))

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
            trials = tuple(Trial(**trial) for trial in content["trials"])
            facts = {name: content[name] for name in ("source", "fingerprint", "made_by", "calibration", "tokens")}
            return cls(**facts, losses=losses, trials=trials)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UsageError(f"{path} is no allocation that quantkit wrote ({error}); give another file, or a new name to measure") from error


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
