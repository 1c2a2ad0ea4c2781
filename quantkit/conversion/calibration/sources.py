"""A source's name -> its records: the built-in mix, a file, a folder of files, or a data set of the hub."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from quantkit.checkpoint.weight_files import some
from quantkit.conversion.calibration.default import DEFAULT_NAME, default_path, is_held_out
from quantkit.conversion.calibration.records import READERS, Budget, Record, file_kind, join_articles, read_records
from quantkit.errors import CalibrationError, did_you_mean

KNOWN_DATASETS = {
    "wikitext": "Salesforce/wikitext:wikitext-2-raw-v1:train",
    "wikitext2": "Salesforce/wikitext:wikitext-2-raw-v1:train",
    "wikitext103": "Salesforce/wikitext:wikitext-103-raw-v1:train",
    "c4": "allenai/c4:en:train",
    "pile-val": "mit-han-lab/pile-val-backup::validation",
    "ultrachat_200k": "HuggingFaceH4/ultrachat_200k::train_sft",
    "open-platypus": "garage-bAInd/Open-Platypus::train",
    "oasst1": "OpenAssistant/oasst1::train",
    "alpaca": "tatsu-lab/alpaca::train",
    "gsm8k": "openai/gsm8k:main:train",
    "fineweb-edu": "HuggingFaceFW/fineweb-edu:sample-10BT:train",
    "cnn_dailymail": "abisee/cnn_dailymail:3.0.0:train",
}
SHUFFLE_BUFFER = 2_000


def open_source(source: str | None, budget: Budget, seed: int, *, held_out: bool = False) -> tuple[str, Iterator[Record]]:
    """(name for people, records). Raises CalibrationError when there is no such thing, before anything is read.

    Args:
        held_out: of the built-in mix, the documents that are never calibrated on instead of all others.
    """
    rng = random.Random(seed)
    if source is None:
        records = read_records(default_path(), budget, rng)
        return DEFAULT_NAME, (record for record in records if is_held_out(record) == held_out)
    path = Path(source).expanduser()
    if path.is_dir():
        return str(path), _folder(path, budget, rng)
    if path.is_file():
        if path.stat().st_size == 0:
            raise CalibrationError(f"{path} is empty")
        return str(path), read_records(path, budget, rng)
    if path.exists():
        raise CalibrationError(f"{path} is neither a file nor a folder")
    if _is_path(source):
        raise CalibrationError(f"no calibration file or folder {source}; {_near(path)}")
    name = KNOWN_DATASETS.get(source.lower(), source)
    if name.split(":")[0].count("/") != 1:
        raise CalibrationError(
            f"unknown calibration source {source!r}: no such file, folder or data set; data sets are named org/name[:config][:split], "
            f"or shortly: {did_you_mean(source, KNOWN_DATASETS)}"
        )
    return name, _dataset(name, budget, seed)


def _is_path(source: str) -> bool:
    return source.startswith(("/", "./", "../", "~", "\\")) or file_kind(Path(source)) is not None or source.count("/") > 1 or source.endswith("/")


def _near(path: Path) -> str:
    """What the folder it should lie in holds."""
    folder = path.parent
    if not folder.is_dir():
        return f"the folder {folder} does not exist either"
    names = [p.name for p in folder.iterdir() if file_kind(p) is not None]
    return did_you_mean(path.name, names) if names else f"{folder} holds no calibration file ({', '.join(sorted(READERS))})"


def _folder(folder: Path, budget: Budget, rng: random.Random) -> Iterator[Record]:
    """Every readable file, in random order, each with an equal share of what is left of the budget; the others are noted."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
    paths = [path for path in files if file_kind(path) is not None]
    others = [str(path.relative_to(folder)) for path in files if file_kind(path) is None]
    if not paths:
        found = f"it holds {some(others, 5)}; " if others else ""
        raise CalibrationError(f"{folder} holds no calibration file; {found}known kinds: {', '.join(sorted(READERS))}")
    if others:
        budget.notes.append(f"not read, being of no known kind: {some(others, 5)}")
    rng.shuffle(paths)
    return _read_all(paths, budget, rng)


def _read_all(paths: list[Path], budget: Budget, rng: random.Random) -> Iterator[Record]:
    total = budget.bytes_left
    notes: list[str] = []
    for index, path in enumerate(paths):
        share = Budget(max(total // (len(paths) - index), 1))
        yield from read_records(path, share, rng)
        total -= min(path.stat().st_size, share.bytes_left)
        notes += share.notes
    budget.notes += notes if len(notes) <= 3 else [*notes[:2], f"{len(notes) - 2} more files were read in part"]


def _dataset(name: str, budget: Budget, seed: int) -> Iterator[Record]:
    """Streamed and shuffled within a buffer, so that a data set of any size costs what is read of it."""
    repository, config, split = [*name.split(":"), "", ""][:3]
    try:
        import datasets

        rows: Any = datasets.load_dataset(repository, config or None, split=split or "train", streaming=True)
        is_lines = repository.lower().endswith("/wikitext")
        if not is_lines:
            rows = rows.shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER)
        first = next(iter(rows), None)
    except Exception as error:  # datasets raises what its many layers raise: connections, missing files, unknown splits
        raise _unreachable(name, error) from error
    if first is None:
        raise CalibrationError(f"the data set {name!r} has no rows")
    records = _within(rows, budget, name)
    return join_articles(records) if is_lines else records


def _within(rows: Iterable[Record], budget: Budget, name: str) -> Iterator[Record]:
    num_bytes = 0
    try:
        for row in rows:
            yield row
            num_bytes += len(str(row))
            if num_bytes > budget.bytes_left:
                budget.notes.append(f"the first {num_bytes / 1e6:.0f} MB of {name} were read")
                return
    except Exception as error:  # the connection breaks in the middle
        raise _unreachable(name, error) from error


def _unreachable(name: str, error: Exception) -> CalibrationError:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return CalibrationError(
        f"cannot load the data set {name!r}: {reason}. Check the name, config and split and that the hub is reachable "
        "(HF_HUB_OFFLINE unset); or give a local file, or no source for the built-in mix"
    )
