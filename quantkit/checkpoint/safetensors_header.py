"""The header of a safetensors file, read with distrust and built byte for byte: 8 bytes of length, JSON, then the tensors without gaps.

The JSON is parsed here and not by the library, because a writer that puts tensors straight to their place must know every offset
before the first tensor exists, and because an error has to name the file and what is wrong with it. Tensors are never touched here.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from quantkit.errors import CheckpointError

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F4": torch.float4_e2m1fn_x2,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

_MAX_HEADER = 100_000_000
_LENGTH_BYTES = 8
_LFS_POINTER = b"version https://git-lfs"


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where one tensor lies.

    Attributes:
        shape: the shape of the torch tensor; a pair of 4-bit floats (F4) is one element.
        file: the file that holds it.
        nbytes: its size in the file.
        offset: its first byte, counted from the start of the file.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    file: Path
    nbytes: int
    offset: int


@dataclass(frozen=True, slots=True)
class Header:
    """What one file says of itself: its tensors by offset, its metadata, its size and the length of the header, both in bytes."""

    file: Path
    tensors: tuple[TensorInfo, ...]
    metadata: dict[str, str]
    file_size: int
    data_start: int


def read_header(file: Path) -> Header:
    """The validated header of a safetensors file; reads no tensor.

    Raises:
        CheckpointError: the file is not safetensors, is truncated, or its header contradicts itself.
    """
    text, file_size = _read_text(file)
    data_start = _LENGTH_BYTES + len(text)
    fields = _parse_json(file, text)
    metadata = fields.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise CheckpointError(f"{file}: the metadata in its header is not a table of strings")
    tensors = sorted((_tensor_info(file, name, field, data_start) for name, field in fields.items()), key=lambda t: (t.offset, t.offset + t.nbytes))
    _check_layout(file, tensors, data_start, file_size)
    return Header(file, tuple(tensors), metadata, file_size, data_start)


def build_header(tensors: Sequence[tuple[str, torch.dtype, tuple[int, ...]]], metadata: Mapping[str, str]) -> bytes:
    """The header of a file that holds these tensors (name, dtype, shape) in this order without gaps, padded so that data starts at 8 bytes."""
    fields: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name, dtype, shape in tensors:
        end = offset + tensor_bytes(dtype, shape)
        fields[name] = {"dtype": DTYPE_NAMES[dtype], "shape": _stored_shape(dtype, shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(fields, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(_LENGTH_BYTES, "little") + text


def tensor_bytes(dtype: torch.dtype, shape: Sequence[int]) -> int:
    """The size in bytes of a tensor of this type and torch shape."""
    return math.prod(shape) * dtype.itemsize


def _read_text(file: Path) -> tuple[bytes, int]:
    """The JSON text of the header, and the size of the file."""
    with file.open("rb") as handle:
        file_size = handle.seek(0, 2)
        handle.seek(0)
        start = handle.read(len(_LFS_POINTER))
        if start == _LFS_POINTER:
            raise CheckpointError(f"{file} is a Git LFS pointer, not the file itself; fetch it with `git lfs pull`")
        if file_size < _LENGTH_BYTES:
            raise CheckpointError(f"{file} is truncated: expected at least {_LENGTH_BYTES} bytes, found {file_size}; fetch it again")
        length = int.from_bytes(start[:_LENGTH_BYTES], "little")
        if length > _MAX_HEADER:
            raise CheckpointError(f"{file} is not a safetensors file: its header would be {length} bytes long, more than {_MAX_HEADER}")
        if _LENGTH_BYTES + length > file_size:
            raise CheckpointError(f"{file} is truncated: expected at least {_LENGTH_BYTES + length} bytes, found {file_size}; fetch it again")
        handle.seek(_LENGTH_BYTES)
        return handle.read(length), file_size


def _parse_json(file: Path, text: bytes) -> dict[str, Any]:
    try:
        fields = json.loads(text.decode(), object_pairs_hook=_unique_keys)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} is not a safetensors file: its header is not valid JSON ({error})") from error
    if not isinstance(fields, dict):
        raise CheckpointError(f"{file} is not a safetensors file: its header is not a JSON object")
    return fields


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise ValueError("a name occurs twice")
    return fields


def _tensor_info(file: Path, name: str, field: Any, data_start: int) -> TensorInfo:
    if not isinstance(field, dict) or not {"dtype", "shape", "data_offsets"} <= field.keys():
        raise CheckpointError(f"{file}: the header's entry of tensor {name!r} lacks its dtype, shape or data_offsets")
    dtype = DTYPES.get(field["dtype"]) if isinstance(field["dtype"], str) else None
    if dtype is None:
        raise CheckpointError(f"{file}: tensor {name!r} is of the unknown type {field['dtype']!r}; known: {', '.join(DTYPES)}")
    if not _are_sizes(field["shape"]) or not _are_sizes(field["data_offsets"]) or len(field["data_offsets"]) != 2:
        raise CheckpointError(f"{file}: the header's entry of tensor {name!r} has an impossible shape or range: {field}")
    shape = _torch_shape(dtype, field["shape"])
    begin, end = field["data_offsets"]
    if shape is None or end - begin != tensor_bytes(dtype, shape):
        raise CheckpointError(f"{file}: tensor {name!r} of type {field['dtype']} and shape {field['shape']} cannot fill bytes {begin} to {end}")
    return TensorInfo(name, dtype, shape, file, end - begin, data_start + begin)


def _are_sizes(values: Any) -> bool:
    """Whether this is a list of counts that fit in 63 bits, alone and (zeros aside) multiplied."""
    is_list = isinstance(values, list) and all(type(v) is int and v >= 0 for v in values)
    return is_list and math.prod(max(v, 1) for v in values) < 1 << 63


def _torch_shape(dtype: torch.dtype, stored: list[int]) -> tuple[int, ...] | None:
    """The shape of the torch tensor; None if 4-bit floats do not come in pairs."""
    if dtype != torch.float4_e2m1fn_x2:
        return tuple(stored)
    if not stored or stored[-1] % 2:
        return None
    return (*stored[:-1], stored[-1] // 2)


def _stored_shape(dtype: torch.dtype, shape: tuple[int, ...]) -> list[int]:
    return [*shape[:-1], shape[-1] * 2] if dtype == torch.float4_e2m1fn_x2 else list(shape)


def _check_layout(file: Path, tensors: list[TensorInfo], data_start: int, file_size: int) -> None:
    end = data_start
    for tensor in tensors:
        if tensor.offset != end:
            fault = "overlaps the tensor before it" if tensor.offset < end else "leaves a gap before it"
            raise CheckpointError(f"{file} is damaged: tensor {tensor.name!r} {fault}")
        end += tensor.nbytes
    if file_size != end:
        fault = "is truncated" if file_size < end else "has bytes that belong to no tensor"
        raise CheckpointError(f"{file} {fault}: expected {end} bytes, found {file_size}; fetch it again")
