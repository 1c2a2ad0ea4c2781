"""Where a model comes from: a folder, the packaged reference model, the Hugging Face Hub or ModelScope. Always ends in a local folder.

Only data is fetched: safetensors, JSON, text, tokenizer files. Pickles are never downloaded, Python files only for who trusts them, and nothing
is run here.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from quantkit.errors import SourceError
from quantkit.paths import packaged

REFERENCE = "reference"

_MODELSCOPE = "modelscope:"
_FETCHED = ["*.safetensors", "*.json", "*.jsonl", "*.txt", "*.model", "*.tiktoken", "*.jinja", "*.md", "LICENSE*", "NOTICE*"]
_NOT_FETCHED = ["*/*.safetensors", "consolidated*.safetensors"]
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?", re.ASCII)
_EXPECTED = "give a folder with config.json and safetensors files, a Hub id such as org/name, modelscope:org/name, or 'reference'"


@dataclass(frozen=True, slots=True)
class Source:
    """A model on this machine: its folder, the name to call it by (the Hub id, or the name of the folder), and what the user gave to have it."""

    folder: Path
    name: str
    given: str


def resolve(source: str, *, revision: str | None = None, trust_remote_code: bool = False) -> Source:
    """The local folder of a model, fetched first if it must be.

    Args:
        source: "reference" is always the packaged model (write ./reference for a folder of that name); otherwise an existing folder
            comes before a Hub id. HF_HUB_OFFLINE=1 keeps to what was fetched before.
        revision: a branch, tag or commit of a Hub or ModelScope repository.
        trust_remote_code: fetch the repository's Python files too.

    Raises:
        SourceError: there is no such model, or it cannot be had; says what would work.
    """
    if not source:
        raise SourceError(f"there is no folder of an empty name; {_EXPECTED}")
    path = Path(source).expanduser()
    if source == REFERENCE:
        return Source(_reference_folder(), REFERENCE, source)
    if path.is_dir():
        return Source(path, path.resolve().name, source)
    if path.is_file():
        raise SourceError(_file_message(path))
    patterns = [*_FETCHED, "*.py"] if trust_remote_code else _FETCHED
    if source.startswith(_MODELSCOPE):
        return _from_modelscope(source.removeprefix(_MODELSCOPE), revision, patterns)
    if _looks_like_path(source):
        raise SourceError(f"there is no folder {source!r}{_near_folders(path)}; {_EXPECTED}")
    return _from_hub(source, revision, patterns)


def _reference_folder() -> Path:
    folder = packaged("evals") / "reference" / "model"
    if not folder.is_dir():
        raise SourceError(f"the reference model is not part of this installation: {folder} does not exist; install quantkit again")
    return folder


def _file_message(path: Path) -> str:
    if path.suffix == ".gguf":
        return f"{path} is a GGUF file, which quantkit does not convert; {_EXPECTED}"
    if path.suffix == ".safetensors":
        return f"{path} is one file of a model; give the folder that holds it and its config.json: {path.parent}"
    return f"{path} is a file; {_EXPECTED}"


def _looks_like_path(source: str) -> bool:
    return source.startswith((".", "~", os.sep)) or source.endswith(os.sep) or _HUB_ID.fullmatch(source) is None


def _near_folders(path: Path) -> str:
    """The part of a message that names folders beside the path with a similar name."""
    if not path.parent.is_dir():
        return ""
    try:
        folders = [entry.name for entry in path.parent.iterdir() if entry.is_dir()]
    except OSError:
        return ""
    near = difflib.get_close_matches(path.name, folders, n=3)
    return f"; did you mean {' or '.join(str(path.parent / name) for name in near)}?" if near else ""


def _from_hub(name: str, revision: str | None, patterns: list[str]) -> Source:
    from huggingface_hub import snapshot_download

    folder = _fetch(name, revision, patterns, snapshot_download)
    _require_weights(folder, name)
    return Source(folder, name, name)


def _fetch(name: str, revision: str | None, patterns: list[str], download: Callable[..., str]) -> Path:
    from huggingface_hub import errors

    at = f" at revision {revision!r}" if revision else ""
    try:
        return Path(download(name, revision=revision, allow_patterns=patterns, ignore_patterns=_NOT_FETCHED))
    except errors.GatedRepoError as error:
        raise SourceError(
            f"{name} is gated: ask for access at https://huggingface.co/{name}, then log in with `hf auth login` or set HF_TOKEN"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise SourceError(f"{name} has no revision {revision!r} on the Hugging Face Hub") from error
    except errors.RepositoryNotFoundError as error:
        raise SourceError(
            f"there is no folder {name!r}{_near_folders(Path(name))}, and no model of this name on the Hugging Face Hub; check the name, "
            "or log in with `hf auth login` if the model is private"
        ) from error
    except errors.HFValidationError as error:
        raise SourceError(f"there is no folder {name!r}, and it cannot be a Hub id: {error}; {_EXPECTED}") from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        raise SourceError(
            f"there is no folder {name!r}{_near_folders(Path(name))}, and the model{at} is not in the local cache, while {_why_offline()}; "
            f"connect and try again, or fetch it elsewhere (`hf download {name}`) and give its folder"
        ) from error
    except (errors.HTTPError, OSError) as error:
        raise SourceError(f"{name}{at} could not be fetched from the Hugging Face Hub: {error}; try again, or give a local folder") from error


def _why_offline() -> str:
    from huggingface_hub import constants

    return "HF_HUB_OFFLINE=1 forbids the network" if constants.HF_HUB_OFFLINE else "the Hugging Face Hub cannot be reached"


def _from_modelscope(name: str, revision: str | None, patterns: list[str]) -> Source:
    try:
        from modelscope import snapshot_download
    except ImportError as error:
        raise SourceError("ModelScope models need the modelscope package; install it with: pip install 'quantkit[modelscope]'") from error
    try:
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=patterns, ignore_patterns=_NOT_FETCHED))
    except Exception as error:  # modelscope raises bare exceptions of many libraries
        raise SourceError(
            f"{name} could not be fetched from ModelScope: {error}; check the name and the connection, or give a local folder"
        ) from error
    _require_weights(folder, name)
    return Source(folder, name, f"{_MODELSCOPE}{name}")


def _require_weights(folder: Path, name: str) -> None:
    if not any(folder.glob("*.safetensors")):
        raise SourceError(
            f"{name} has no safetensors files. If it has pickles (pytorch_model.bin), they can run any code when opened, so quantkit does not fetch "
            "them: look for a revision with safetensors, or convert it where you trust it with save_pretrained(..., safe_serialization=True)"
        )
