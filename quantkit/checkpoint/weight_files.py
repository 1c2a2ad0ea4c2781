"""Which files of a folder hold its tensors: one file, an index with its shards, or shards without an index. Pickles never do."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from quantkit.errors import CheckpointError, QuantkitError, SourceError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_NUMBERED_SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.safetensors")


def find_weight_files(folder: Path) -> tuple[list[str], dict[str, str]]:
    """The names of the weight files, and the index's map from tensor to file (empty without an index).

    Raises:
        SourceError: there are no weights.
        CheckpointError: a file that the index or the shards' numbers call for is absent, the folder is half written, or holds only pickles.
    """
    _refuse_half_written(folder)
    weight_map = _read_index(folder)
    return _weight_files(folder, weight_map), weight_map


def _refuse_half_written(folder: Path) -> None:
    if (folder / "ledger.json").is_file() and not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder} is an unfinished conversion; run the same command again to finish it")


def _read_index(folder: Path) -> dict[str, str]:
    """Tensor name -> file name from the index; empty where one file holds the model or there is no index."""
    path = folder / INDEX_FILE
    if (folder / SINGLE_FILE).is_file() or not path.is_file():
        return {}
    weight_map = read_json_object(path, CheckpointError).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
        raise CheckpointError(f"{path} has no weight_map from tensor names to file names")
    for name in weight_map.values():
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise CheckpointError(f"{path} names the file {name!r} outside of its folder")
    return weight_map


def _weight_files(folder: Path, weight_map: dict[str, str]) -> list[str]:
    if (folder / SINGLE_FILE).is_file():
        return [SINGLE_FILE]
    if weight_map:
        names = sorted(set(weight_map.values()))
        _require_files(folder, names, f"{folder / INDEX_FILE} names")
        return names
    names = sorted(path.name for path in folder.glob("*.safetensors"))
    if not names:
        raise _no_weights(folder)
    numbered = [match for match in map(_NUMBERED_SHARD.fullmatch, names) if match]
    if not numbered:
        return names
    _require_files(folder, _all_numbers(numbered), "the numbers of its shards call for")
    return [match[0] for match in numbered]


def _all_numbers(shards: list[re.Match[str]]) -> list[str]:
    """The names of the whole set that these shards are numbered in."""
    sets = {(shard["stem"], int(shard["count"])) for shard in shards}
    return [f"{stem}-{number:05d}-of-{count:05d}.safetensors" for stem, count in sets for number in range(1, count + 1)]


def _require_files(folder: Path, names: Iterable[str], who: str) -> None:
    absent = sorted(name for name in names if not (folder / name).is_file())
    if absent:
        raise CheckpointError(f"{folder}: {who} {some(absent)}, which {'is' if len(absent) == 1 else 'are'} not there; fetch the model again")


def _no_weights(folder: Path) -> QuantkitError:
    pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
    if not pickles:
        return SourceError(f"{folder} holds no *.safetensors files; found {listing(folder)}")
    return CheckpointError(
        f"{folder / pickles[0]} is a pickle, and there are no safetensors files beside it. A pickle can run any code when it is opened, so quantkit "
        "never reads one. Fetch a revision of the model with safetensors, or convert it on a machine where you trust it: "
        "AutoModelForCausalLM.from_pretrained(...).save_pretrained(..., safe_serialization=True)"
    )


def read_json_object(path: Path, error_type: type[QuantkitError]) -> dict[str, Any]:
    """The JSON object in a file; anything else raises `error_type`."""
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError, OSError) as error:
        raise error_type(f"{path} is not readable JSON: {error}") from error
    if not isinstance(value, dict):
        raise error_type(f"{path} is not a JSON object")
    return value


def listing(folder: Path) -> str:
    """What lies in a folder, for an error message."""
    return some(sorted(path.name for path in folder.iterdir())) or "an empty folder"


def some(names: list[str], limit: int = 8) -> str:
    """The first names of a list that may be long, for an error message."""
    rest = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {rest} more" if rest > 0 else "")
