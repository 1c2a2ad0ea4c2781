"""What a conversion takes: memory over a checkpoint larger than it may use, memory at two depths, and time."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from quantkit.bench.process import Usage, run
from quantkit.bench.random_checkpoint import write_random_checkpoint


@dataclass(frozen=True, slots=True)
class Case:
    """One conversion of a random model. `samples` rows of `seq_len` tokens calibrate it; recipes without data take none."""

    name: str
    recipe: str
    layers: int
    hidden: int
    intermediate: int
    samples: int = 0
    seq_len: int = 256


CASES = (
    Case("data-free, 2 GB", "w4a16-rtn", 22, 2048, 5632),
    Case("data-free with scale search, 0.4 GB", "w4a16-mse", 4, 2048, 5632),
    Case("calibrated, 4 blocks", "w4a16-gptq", 4, 512, 1536, samples=32),
    Case("calibrated, 16 blocks", "w4a16-gptq", 16, 512, 1536, samples=32),
)


@dataclass(frozen=True, slots=True)
class Result:
    case: Case
    source_bytes: int
    usage: Usage


def measure(cases: tuple[Case, ...] = CASES, work: Path | None = None) -> Iterator[Result]:
    """Convert each case in a process of its own. Needs disk for the largest case's model and its output, freed after each."""
    for case in cases:
        with tempfile.TemporaryDirectory(dir=work) as folder:
            model = Path(folder) / "model"
            size = write_random_checkpoint(model, layers=case.layers, hidden=case.hidden, intermediate=case.intermediate)
            command = [sys.executable, "-m", "quantkit", "convert", str(model), "-o", str(Path(folder) / "out"), "-r", case.recipe]
            if case.samples:
                command += ["--num-samples", str(case.samples), "--seq-len", str(case.seq_len)]
            yield Result(case, size, run(command))


def machine() -> str:
    """Processors and load, without which times mean nothing."""
    load = os.getloadavg()[0]
    return f"{os.cpu_count()} processors, load average {load:.1f}"
