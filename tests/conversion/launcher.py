"""Orders in as JSON lines, one process forked for each, an account out. Started by conftest.py; imports once what every command imports."""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers.models.llama.modeling_llama  # noqa: F401

import quantkit.cli.convert
import quantkit.cli.progress
import quantkit.conversion.convert
import quantkit.models.tokenizer  # noqa: F401
from quantkit.cli.main import main
from quantkit.core.packing import pack

pack(torch.empty(1, 1, dtype=torch.uint8, device="meta"), 4)  # torch imports much at the first tensor without values


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def obey(order: dict[str, Any], stdout: int, stderr: int, note: int) -> None:
    """The child: never returns."""
    os.dup2(stdout, 1)
    os.dup2(stderr, 2)
    start, code = resident_bytes(), 1
    try:
        main(order["arguments"])
    except SystemExit as ending:
        code = int(ending.code or 0)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os.write(note, str(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - start).encode())
        os._exit(code)


def wait(pid: int, order: dict[str, Any], started: float) -> int:
    """Wait for the child's end, and hurry it when the order says so; its exit code, or minus the signal that ended it."""
    is_sent = order["after"] is None and order["once"] is None
    while True:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        due = order["after"] is not None and time.monotonic() - started >= order["after"]
        if not is_sent and (due or (order["once"] is not None and os.path.exists(order["once"]))):
            os.kill(pid, getattr(signal, order["send"]))
            is_sent = True
        time.sleep(0.001)


def run(order: dict[str, Any]) -> dict[str, Any]:
    """Fork, obey, and tell how it ended."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err, tempfile.TemporaryFile("w+") as grown:
        started = time.monotonic()
        pid = os.fork()
        if pid == 0:
            obey(order, out.fileno(), err.fileno(), grown.fileno())
        code = wait(pid, order, started)
        seconds = time.monotonic() - started
        for file in (out, err, grown):
            file.seek(0)
        return {"code": code, "seconds": seconds, "stdout": out.read(), "stderr": err.read(), "grown": int(grown.read() or 0)}


if __name__ == "__main__":
    for line in sys.stdin:
        print(json.dumps(run(json.loads(line))), flush=True)
