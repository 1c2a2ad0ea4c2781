"""What a checkpoint holds, as one number: figures found of it are its own only while this stays the same."""

from __future__ import annotations

import hashlib
from functools import lru_cache
from pathlib import Path

from quantkit.checkpoint.reader import CheckpointReader


def content_digest(folder: Path) -> str:
    """sha256 over config.json and every byte of the weight files, whatever they are called.

    Raises:
        SourceError, CheckpointError: nothing here is a checkpoint, or a file is damaged.
    """
    files = sorted({folder / "config.json", *(Path(file) for file in CheckpointReader(folder).files)})
    return _digest(tuple((path, stat.st_size, stat.st_mtime_ns) for path in files if (stat := path.stat())))


@lru_cache(maxsize=64)
def _digest(files: tuple[tuple[Path, int, int], ...]) -> str:
    digests = []
    for path, _, _ in files:
        with path.open("rb") as file:
            digests.append(hashlib.file_digest(file, "sha256").hexdigest())
    return hashlib.sha256(" ".join(sorted(digests)).encode()).hexdigest()
