"""Run a command and account for it: wall time, processor time, and the most memory of its own it held at any moment."""

from __future__ import annotations

import os
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

from quantkit.errors import QuantkitError

_INTERVAL = 0.01


@dataclass(frozen=True, slots=True)
class Usage:
    """Seconds, and bytes: `peak_private` is the largest RssAnon + RssShmem seen, sampled every 10 ms (Linux; elsewhere 0), so pages that are
    only mapped from files, such as the libraries', are left out; `peak_resident` counts them too."""

    seconds: float
    cpu_seconds: float
    peak_private: int
    peak_resident: int


def run(command: list[str]) -> Usage:
    """Raises QuantkitError with the command's own message when it fails."""
    started = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    peak = 0
    status = Path(f"/proc/{process.pid}/status")
    while True:
        pid, code, usage = os.wait4(process.pid, os.WNOHANG)
        if pid:
            break
        peak = max(peak, _private_bytes(status))
        time.sleep(_INTERVAL)
    seconds = time.monotonic() - started
    assert process.stderr is not None
    message = process.stderr.read()
    process.stderr.close()
    process.returncode = os.waitstatus_to_exitcode(code)
    if process.returncode:
        raise QuantkitError(f"{' '.join(command)} failed: {message.strip().splitlines()[-1] if message.strip() else process.returncode}")
    return Usage(seconds, usage.ru_utime + usage.ru_stime, peak, usage.ru_maxrss * 1024)


def _private_bytes(status: Path) -> int:
    try:
        lines = status.read_text().splitlines()
    except OSError:
        return 0
    return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith(("RssAnon:", "RssShmem:")))
