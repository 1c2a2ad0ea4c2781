"""C++ sources to loaded libraries: compiled for this processor when first used and kept in the user's cache. Without a compiler there are none."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

FLAGS = ("-std=c++17", "-O3", "-fno-math-errno", "-fopenmp", "-shared", "-fPIC")
COMPILERS = ("g++", "clang++", "c++")

_log = logging.getLogger("quantkit")


@functools.cache
def library(name: str, march: str = "native") -> ctypes.CDLL | None:
    """The library of `name`.cpp, or None, with the reason in the log once, where it cannot be built. QUANTKIT_NATIVE=0 asks for none.

    Args:
        march: the instructions it may use, as compilers name them; this processor must have them.
    """
    if os.environ.get("QUANTKIT_NATIVE", "1") == "0":
        return None
    compiler = next((path for path in map(shutil.which, COMPILERS) if path), None)
    if compiler is None:
        _log.warning("no C++ compiler (%s) is installed, so %s runs on torch's operators, which are slower", ", ".join(COMPILERS), name)
        return None
    source = Path(__file__).with_name(f"{name}.cpp")
    flags = (*FLAGS, f"-march={march}")
    built = _cache() / f"{name}-{_fingerprint(source, compiler, flags)}.so"
    if not built.exists():
        reason = _compile([compiler, *flags], source, built)
        if reason:
            _log.warning("%s could not be compiled, so it runs on torch's operators, which are slower: %s", name, reason)
            return None
    try:
        return ctypes.CDLL(str(built))
    except OSError as error:
        _log.warning("%s was compiled and cannot be loaded, so it runs on torch's operators, which are slower: %s", name, error)
        return None


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "quantkit" / "native"


def _fingerprint(source: Path, compiler: str, flags: tuple[str, ...]) -> str:
    """Another source, compiler or processor is another library."""
    info = Path("/proc/cpuinfo")
    features = next((line for line in info.read_text().splitlines() if line.startswith(("flags", "Features"))), "") if info.exists() else ""
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout
    parts = (source.read_text(encoding="utf-8"), version, *flags, platform.machine(), features)
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _compile(command: list[str], source: Path, built: Path) -> str | None:
    """Why it failed, or None. The library appears whole or not at all."""
    try:
        built.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=built.parent) as folder:
            made = Path(folder) / built.name
            done = subprocess.run([*command, str(source), "-o", str(made)], capture_output=True, text=True, check=False)
            if done.returncode:
                return (done.stderr.strip().splitlines() or ["the compiler said nothing"])[0]
            made.replace(built)
    except OSError as error:
        return str(error)
    return None
