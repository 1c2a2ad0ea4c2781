"""The tensors of a checkpoint folder, one at a time. Opening reads headers only; pickles are refused, never opened.

Tensors are read with pread into memory of their own, so the resident set is that of the tensors the caller holds, and a file that
shrinks underneath is an error and not a crash of the process.
"""

from __future__ import annotations

import difflib
import hashlib
import os
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantkit.checkpoint.safetensors_header import Header, TensorInfo, read_header
from quantkit.checkpoint.weight_files import INDEX_FILE, find_weight_files, listing, read_json_object, some
from quantkit.errors import CheckpointError, SourceError

_EDGE = 64 * 1024
_WINDOW = 4 * 1024
_NUM_WINDOWS = 64


class CheckpointReader:
    """The tensors and settings of one model folder.

    Args:
        folder: holds config.json and model.safetensors, or an index with its shards, or any *.safetensors files.

    Raises:
        SourceError: nothing here is a checkpoint.
        CheckpointError: a file is damaged, truncated, absent or half written, or there are only pickles.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise SourceError(f"{self.folder} is not a folder; a model is a folder with config.json and safetensors files")
        files, weight_map = find_weight_files(self.folder)
        self._headers = [_open(self.folder / name) for name in files]
        self._tensors = _collect(self._headers, weight_map)
        absent = [f"{name!r} ({file})" for name, file in weight_map.items() if name not in self._tensors]
        if absent:
            raise CheckpointError(f"{self.folder / INDEX_FILE} names tensors that are not in their files: {some(absent)}")

    @property
    def names(self) -> list[str]:
        """All tensors, file by file in the order of their bytes."""
        return list(self._tensors)

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def __len__(self) -> int:
        return len(self._tensors)

    def info(self, name: str) -> TensorInfo:
        """Type, shape and place of a tensor, from the header alone.

        Raises:
            CheckpointError: there is no such tensor.
        """
        if name not in self._tensors:
            near = difflib.get_close_matches(name, self._tensors, n=3)
            hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
            raise CheckpointError(f"{self.folder} holds no tensor {name!r}{hint}")
        return self._tensors[name]

    def get(self, name: str) -> Tensor:
        """The tensor in CPU memory of its own, exactly as stored.

        Raises:
            CheckpointError: there is no such tensor, or its file has become shorter since it was opened.
        """
        info = self.info(name)
        buffer = torch.empty(info.nbytes, dtype=torch.uint8)
        _read_into(info, buffer)
        return buffer.view(info.dtype).view(info.shape)

    @property
    def files(self) -> list[Path]:
        """The weight files, in the order of `names`."""
        return [header.file for header in self._headers]

    @property
    def total_bytes(self) -> int:
        """The bytes of all weight files, headers included."""
        return sum(file.stat().st_size for file in self.files)

    @property
    def metadata(self) -> dict[str, str]:
        """The metadata of all files; where two differ, the first file's."""
        return {key: value for header in reversed(self._headers) for key, value in header.metadata.items()}

    @cached_property
    def config(self) -> dict[str, Any]:
        """The content of config.json.

        Raises:
            SourceError: it is absent or not a JSON object.
        """
        path = self.folder / "config.json"
        if not path.is_file():
            raise SourceError(f"{self.folder} has no config.json, so the kind of model is unknown; found {listing(self.folder)}")
        return read_json_object(path, SourceError)

    @property
    def quantization_config(self) -> dict[str, Any] | None:
        """How the checkpoint says it is quantized: from config.json, its text_config, or quantize_config.json; None if it is not."""
        text_config = self.config.get("text_config")
        for config in (self.config, text_config if isinstance(text_config, dict) else {}):
            found = config.get("quantization_config") or config.get("compression_config")
            if found:
                return found
        path = self.folder / "quantize_config.json"
        return read_json_object(path, SourceError) if path.is_file() else None

    def fingerprint(self) -> str:
        """A sha256 in hex that is equal for a copied folder and differs for other weights; reads under half a megabyte a file, and the header.

        It covers config.json, and of every file the name, size, header, first and last 64 KiB and 64 windows of 4 KiB spread over it.
        """
        digest = hashlib.sha256()
        config = self.folder / "config.json"
        digest.update(config.read_bytes() if config.is_file() else b"")
        for header in self._headers:
            digest.update(f"\0{header.file.relative_to(self.folder)}\0{header.file_size}\0".encode())
            _digest_samples(digest, header)
        return digest.hexdigest()


def _open(file: Path) -> Header:
    try:
        return read_header(file)
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror}") from error


def _collect(headers: list[Header], weight_map: dict[str, str]) -> dict[str, TensorInfo]:
    """All tensors by name. One that lies in two files is taken from where the index says, and is an error without an index."""
    tensors: dict[str, TensorInfo] = {}
    for tensor in (t for header in headers for t in header.tensors):
        if Path(weight_map.get(tensor.name, tensor.file.name)).name != tensor.file.name:
            continue
        other = tensors.setdefault(tensor.name, tensor)
        if other is not tensor:
            raise CheckpointError(f"tensor {tensor.name!r} is both in {other.file} and in {tensor.file}; remove the file that does not belong")
    return tensors


def _read_into(info: TensorInfo, buffer: Tensor) -> None:
    view = memoryview(buffer.numpy())
    descriptor = os.open(info.file, os.O_RDONLY)
    try:
        done = 0
        while done < info.nbytes:
            count = os.preadv(descriptor, [view[done:]], info.offset + done)
            if count == 0:
                raise CheckpointError(f"{info.file} became shorter since it was opened: tensor {info.name!r} ends at {info.offset + info.nbytes}")
            done += count
    finally:
        os.close(descriptor)


def _digest_samples(digest: hashlib._Hash, header: Header) -> None:
    last = header.file_size - _WINDOW
    windows = [(last * i // _NUM_WINDOWS, _WINDOW) for i in range(_NUM_WINDOWS)] if last > 0 else []
    edges = [(0, header.data_start + _EDGE), (max(0, header.file_size - _EDGE), _EDGE)]
    with header.file.open("rb") as handle:
        for offset, count in edges + windows:
            handle.seek(offset)
            digest.update(handle.read(count))
