"""What a verification finds: named checks, each passed or failed for a stated reason."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from quantkit.core.divergence import DivergenceResult

_SHOWN = 3


@dataclass(frozen=True, slots=True)
class Check:
    name: str
    ok: bool
    detail: str


@dataclass(slots=True)
class Verification:
    """All checks of one checkpoint.

    Attributes:
        layer_errors: relative squared error ||W - Q||² / ||W||² of every quantized layer, where there was an original.
        divergence: against the original over some thousand tokens, where it was measured.
    """

    path: str
    against: str | None
    checks: list[Check] = field(default_factory=list)
    layer_errors: dict[str, float] = field(default_factory=dict)
    divergence: DivergenceResult | None = None

    @property
    def ok(self) -> bool:
        return all(check.ok for check in self.checks)

    def add(self, name: str, problems: Sequence[str], passed: str) -> None:
        """One check: failed if there are problems, of which the first are told; else passed with these words."""
        more = f" and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        self.checks.append(Check(name, not problems, "; ".join(problems[:_SHOWN]) + more if problems else passed))

    def to_dict(self) -> dict[str, Any]:
        divergence = self.divergence.to_dict() if self.divergence else None
        return asdict(self) | {"ok": self.ok, "divergence": divergence}
