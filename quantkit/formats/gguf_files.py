"""GGUF files by name and head, so that one can be told what it is; their tensors are not read."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

from quantkit.errors import CheckpointError

_HEAD = struct.Struct("<4sIQQ")


@dataclass(frozen=True, slots=True)
class GGUFHead:
    version: int
    num_tensors: int
    num_settings: int


def gguf_files(path: Path) -> list[Path]:
    """The file itself, or a folder's GGUF files where it has no safetensors; else nothing."""
    if path.is_file() and path.suffix == ".gguf":
        return [path]
    if not path.is_dir() or any(path.glob("*.safetensors")):
        return []
    return sorted(path.glob("*.gguf"))


def read_gguf_head(file: Path) -> GGUFHead:
    """Raises CheckpointError when the file does not begin as GGUF does."""
    with file.open("rb") as handle:
        head = handle.read(_HEAD.size)
    if len(head) < _HEAD.size or head[:4] != b"GGUF":
        raise CheckpointError(f"{file} is not a GGUF file, or is truncated: it begins with {head[:4]!r}, not b'GGUF'")
    return GGUFHead(*_HEAD.unpack(head)[1:])
