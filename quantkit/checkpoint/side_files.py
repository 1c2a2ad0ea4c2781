"""What a model folder holds beside weights and config.json: tokenizer, chat template, generation settings, licence, custom code, sub-folders.

They are copied as they are and never run or parsed. Symbolic links are followed only inside the model folder and into a Hugging Face
cache, so that a foreign repository cannot have a private file of this machine copied into a model that will be published.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection
from pathlib import Path

from quantkit.checkpoint.disk import disk_errors
from quantkit.checkpoint.ledger import LEDGER_FILE
from quantkit.errors import SourceError

_WEIGHTS = (".safetensors", ".pt", ".pth", ".ckpt", ".pkl", ".gguf", ".onnx", ".onnx_data", ".msgpack", ".h5", ".ot", ".tflite", ".part")
_INDEXES = tuple(f"{suffix}.index.json" for suffix in (*_WEIGHTS, ".bin"))
_PICKLED = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
"""How torch's files begin; a .bin that begins otherwise holds no weights: sentencepiece's spm.bin, say."""
_REWRITTEN = ("config.json", "quantize_config.json", LEDGER_FILE)


def side_files(source_folder: Path, *, exclude: Collection[str] = ()) -> list[Path]:
    """The side files of a model, as paths relative to its folder, sorted.

    Args:
        exclude: further relative paths, such as "README.md", that are left out.

    Raises:
        SourceError: one of them is a link that is broken or leads out of the model.
    """
    source_folder = Path(source_folder)
    left_out = {*_REWRITTEN, *exclude}
    found = [path for path in _files(source_folder) if path.as_posix() not in left_out and not _is_weights(source_folder, path)]
    for path in found:
        _require_inside(source_folder, path)
    return found


def left_behind(source_folder: Path, *, weights: Collection[Path], exclude: Collection[str] = ()) -> list[Path]:
    """The files of a model that come neither along nor anew, sorted: weights that are not the model's own, pickles, and what is excluded.

    Args:
        weights: the files that hold the model's tensors.
    """
    source_folder = Path(source_folder)
    known = {*side_files(source_folder, exclude=exclude), *map(Path, _REWRITTEN), *(path.relative_to(source_folder) for path in weights)}
    return [path for path in _files(source_folder) if path not in known and not path.name.endswith(_INDEXES)]


def copy_side_files(source_folder: Path, folder: Path, *, exclude: Collection[str] = ()) -> list[Path]:
    """Copy every side file into `folder`, sub-folders included, contents instead of links.

    Returns:
        The relative paths that were copied.

    Raises:
        SourceError: see `side_files`.
        OutputError: the disk refuses.
    """
    source_folder, folder = Path(source_folder), Path(folder)
    own = folder.resolve()
    copied = [path for path in side_files(source_folder, exclude=exclude) if not (source_folder / path).resolve().is_relative_to(own)]
    for path in copied:
        with disk_errors(folder / path):
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source_folder / path, folder / path)
    return copied


def _files(folder: Path) -> list[Path]:
    """Every file that is not hidden, relative to the folder, sorted."""
    found: list[Path] = []
    for root, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not _is_hidden(name)]
        found += [(Path(root) / name).relative_to(folder) for name in names if not _is_hidden(name)]
    return sorted(found)


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name == "__pycache__" or name.endswith(".partial")


def _is_weights(source_folder: Path, path: Path) -> bool:
    return path.name.endswith(_WEIGHTS + _INDEXES) or (path.suffix == ".bin" and _is_pickle(source_folder / path))


def _is_pickle(path: Path) -> bool:
    if path.name.startswith("pytorch_model"):
        return True
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(4).startswith(_PICKLED)


def _require_inside(source_folder: Path, path: Path) -> None:
    if not (source_folder / path).is_symlink():
        return
    target = (source_folder / path).resolve()
    is_cached = any(parent.name == "blobs" and parent.parent.name.startswith("models--") for parent in target.parents)
    if not target.is_file() or not (is_cached or target.is_relative_to(source_folder.resolve())):
        fault = "leads out of the model" if target.exists() else "leads nowhere"
        raise SourceError(f"{source_folder / path} is a link that {fault} ({target}); put the file itself in its place, or remove it")
