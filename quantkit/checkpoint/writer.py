"""The tensors of a new checkpoint, written straight to their place: every shape is known before the first tensor, so headers come first.

A shard is a valid file of its full size from its first tensor on; what in it is real is known to the ledger alone. Within a shard
wider types come first, in the plan's order otherwise, so that every tensor is aligned to its type as safetensors' own writer does it.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from quantkit.checkpoint.disk import disk_errors, sync_folder, write_atomically
from quantkit.checkpoint.safetensors_header import DTYPE_NAMES, build_header, tensor_bytes
from quantkit.checkpoint.weight_files import INDEX_FILE, SINGLE_FILE
from quantkit.errors import OutputError


@dataclass(frozen=True, slots=True)
class TensorPlan:
    """A tensor that will be written: its torch type and shape."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return tensor_bytes(self.dtype, self.shape)


@dataclass(frozen=True, slots=True)
class _Shard:
    """One file: its header, where each of its tensors begins, and its size, all in bytes."""

    path: Path
    header: bytes
    offsets: dict[str, int]
    size: int


class CheckpointWriter:
    """Writes the planned tensors in any order; holds no tensor after `add` returns.

    Args:
        folder: exists; shards and, if there are several, their index are written into it.
        plan: every tensor, in the order in which shards are filled.
        max_shard_size: bytes of tensors in one file; a larger tensor gets a file of its own.
        metadata: of every file, beside the "format": "pt" that transformers asks for.

    Raises:
        OutputError: from `add`, `sync` and `close`, when the disk refuses.
    """

    def __init__(self, folder: Path, plan: Sequence[TensorPlan], *, max_shard_size: int, metadata: Mapping[str, str] | None = None) -> None:
        self.folder = Path(folder)
        self._plan = {tensor.name: tensor for tensor in plan}
        assert len(self._plan) == len(plan), "a tensor is planned twice"
        assert max_shard_size > 0 and all(tensor.dtype in DTYPE_NAMES for tensor in plan)
        self._shards = _lay_out(self.folder, plan, max_shard_size, {"format": "pt", **(metadata or {})})
        self._shard_of = {name: shard for shard in self._shards for name in shard.offsets}
        self._done: set[str] = set()
        self._opened: dict[Path, int] = {}

    @property
    def files(self) -> list[Path]:
        """The shards, written or not."""
        return [shard.path for shard in self._shards]

    @property
    def total_bytes(self) -> int:
        """The size of all shards with their headers."""
        return sum(shard.size for shard in self._shards)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        """Let go of the files; what was not synced may be lost, and nothing is checked: that is `close`."""
        while self._opened:
            os.close(self._opened.popitem()[1])

    def mark_done(self, names: Iterable[str]) -> None:
        """Vouch for tensors that an earlier run wrote and synced; to be called before the first `add`.

        Raises:
            OutputError: a shard that should hold them is gone or is another file.
        """
        names = list(names)
        assert not self._opened
        for path, shard in {self._shard_of[name].path: self._shard_of[name] for name in names}.items():
            if not _is_planned(shard):
                raise OutputError(f"{path} was written by the unfinished run, and is gone or changed; --fresh discards that work and starts over")
        self._done.update(names)

    def add(self, name: str, tensor: Tensor) -> None:
        """Write one tensor to its place. A tensor that is not contiguous or not on the CPU is copied for the moment."""
        planned = self._plan[name]
        assert (tensor.dtype, tuple(tensor.shape)) == (planned.dtype, planned.shape), f"{name}: {tensor.dtype} {tuple(tensor.shape)} is not {planned}"
        shard = self._shard_of[name]
        with disk_errors(shard.path):
            _write_all(self._open(shard), _bytes_of(tensor), shard.offsets[name])
        self._done.add(name)

    def read(self, name: str) -> Tensor:
        """A tensor that was added or marked done, read back from its place."""
        assert name in self._done, name
        planned, shard = self._plan[name], self._shard_of[name]
        tensor = torch.empty(planned.shape, dtype=planned.dtype)
        with disk_errors(shard.path), shard.path.open("rb") as file:
            file.seek(shard.offsets[name])
            file.readinto(_bytes_of(tensor))
        return tensor

    def sync(self) -> None:
        """Make everything added so far durable; only then may a ledger record it."""
        for path, descriptor in self._opened.items():
            with disk_errors(path):
                os.fsync(descriptor)
        with disk_errors(self.folder):
            sync_folder(self.folder)
        self.__exit__()

    def close(self) -> None:
        """Sync, and write the index if there are several shards. Every planned tensor must have been added or marked done."""
        absent = self._plan.keys() - self._done
        assert not absent, f"planned but never written: {sorted(absent)[:8]}"
        for shard in self._shards:
            with disk_errors(shard.path):
                if not shard.offsets:
                    self._open(shard)
                assert _is_planned(shard), f"{shard.path} changed while it was written"
        self.sync()
        if len(self._shards) > 1:
            write_atomically(self.folder / INDEX_FILE, self._index())

    def _open(self, shard: _Shard) -> int:
        """A descriptor that stays open until the next sync. A file without one finished tensor that is not as planned is begun anew."""
        if shard.path not in self._opened:
            flags = os.O_RDWR | os.O_CREAT | (0 if _is_planned(shard) else os.O_TRUNC)
            assert not flags & os.O_TRUNC or self._done.isdisjoint(shard.offsets), f"{shard.path} lost tensors that are done"
            self._opened[shard.path] = descriptor = os.open(shard.path, flags, 0o644)
            if flags & os.O_TRUNC:
                os.ftruncate(descriptor, shard.size)
                _write_all(descriptor, memoryview(shard.header), 0)
        return self._opened[shard.path]

    def _index(self) -> bytes:
        weight_map = {name: shard.path.name for name, shard in self._shard_of.items()}
        total_size = sum(tensor.nbytes for tensor in self._plan.values())
        return (json.dumps({"metadata": {"total_size": total_size}, "weight_map": weight_map}, indent=2, sort_keys=True) + "\n").encode()


def require_space(folder: Path, num_bytes: int) -> None:
    """Refuse before the work what will not fit. Shards that an unfinished run left in the folder count as space that is there.

    Args:
        folder: where the files will lie; it or its parents need not exist yet.

    Raises:
        OutputError: the disk has less than `num_bytes` free.
    """
    existing = next(path for path in (Path(folder).absolute(), *Path(folder).absolute().parents) if path.exists())
    reused = sum(path.stat().st_blocks * 512 for path in Path(folder).glob("*.safetensors"))
    free = shutil.disk_usage(existing).free + reused
    if free < num_bytes:
        raise OutputError(f"{folder} needs {_size(num_bytes)} and its disk has {_size(free)} free; free some space or choose another place")


def planned_bytes(plan: Sequence[TensorPlan], max_shard_size: int) -> int:
    """The size of the files that a plan becomes, headers included."""
    return sum(shard.size for shard in _lay_out(Path(), plan, max_shard_size, {"format": "pt"}))


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e7 else f"{num_bytes / 1e6:.2f} MB"


def _lay_out(folder: Path, plan: Sequence[TensorPlan], max_shard_size: int, metadata: Mapping[str, str]) -> list[_Shard]:
    groups = _split(plan, max_shard_size) or [[]]
    count = len(groups)
    names = [SINGLE_FILE] if count == 1 else [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    return [_shard(folder / name, group, metadata) for name, group in zip(names, groups, strict=True)]


def _split(plan: Sequence[TensorPlan], max_shard_size: int) -> list[list[TensorPlan]]:
    """The plan in shards, as huggingface_hub splits a state dict: greedily, and a tensor over the limit alone, ahead of the shard being filled."""
    groups: list[list[TensorPlan]] = []
    current: list[TensorPlan] = []
    filled = 0
    for tensor in plan:
        if tensor.nbytes > max_shard_size:
            groups.append([tensor])
            continue
        if filled + tensor.nbytes > max_shard_size:
            groups.append(current)
            current, filled = [], 0
        current.append(tensor)
        filled += tensor.nbytes
    return [*groups, current] if current else groups


def _shard(path: Path, tensors: list[TensorPlan], metadata: Mapping[str, str]) -> _Shard:
    ordered = sorted(tensors, key=lambda tensor: -tensor.dtype.itemsize)
    header = build_header([(tensor.name, tensor.dtype, tensor.shape) for tensor in ordered], metadata)
    offsets, end = {}, len(header)
    for tensor in ordered:
        offsets[tensor.name] = end
        end += tensor.nbytes
    return _Shard(path, header, offsets, end)


def _is_planned(shard: _Shard) -> bool:
    """Whether the file is there with exactly the planned header and size."""
    if not shard.path.is_file() or shard.path.stat().st_size != shard.size:
        return False
    with shard.path.open("rb") as handle:
        return handle.read(len(shard.header)) == shard.header


def _bytes_of(tensor: Tensor) -> memoryview:
    flat = tensor.detach().to("cpu").contiguous().view(-1) if tensor.dim() else tensor.detach().to("cpu").reshape(1)
    return memoryview(flat.view(torch.uint8).numpy())


def _write_all(descriptor: int, content: memoryview, offset: int) -> None:
    done = 0
    while done < len(content):
        done += os.pwrite(descriptor, content[done:], offset + done)
