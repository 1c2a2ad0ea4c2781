"""Writing to a disk that may be full, read-only or forbidden, and that may lose power: errors in the user's words, files that are whole or absent."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from quantkit.errors import OutputError

_ADVICE = {
    errno.ENOSPC: "free some space or choose another place; the work so far is kept, and the same command goes on with it",
    errno.EDQUOT: "your quota is used up: free some space or choose another place; the work so far is kept, and the same command goes on with it",
    errno.EROFS: "the file system is read-only; choose another place",
    errno.EACCES: "you may not write there; choose another place",
    errno.EPERM: "you may not write there; choose another place",
    errno.EFBIG: "the file system or a limit allows no file of this size; choose smaller shards",
    errno.ENOTDIR: "a part of the path is a file; choose another place",
    errno.ENAMETOOLONG: "the name is too long; choose a shorter one",
}


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn an OSError of the body into an OutputError that names the path and what would help."""
    try:
        yield
    except OSError as error:
        advice = _ADVICE.get(error.errno or 0, "check the disk or choose another place")
        raise OutputError(f"cannot write {path}: {error.strerror or error}; {advice}") from error


def write_atomically(path: Path, content: bytes) -> None:
    """Write a small file so that it is there whole or not at all, whatever happens.

    Raises:
        OutputError: it cannot be written.
    """
    temporary = path.with_name(path.name + ".tmp")
    with disk_errors(path):
        with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644), "wb") as handle:
            handle.write(content)
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
