"""The life of an output folder: built as OUT.partial under a lock, renamed to OUT when it is whole.

OUT is a finished model or does not exist. A partial folder cannot be loaded by mistake: its config.json is to be written last,
just before `finish`, and no loader takes a folder without one.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from contextlib import suppress
from pathlib import Path

from quantkit.checkpoint.disk import disk_errors, sync_folder
from quantkit.checkpoint.ledger import LEDGER_FILE
from quantkit.checkpoint.side_files import copy_side_files
from quantkit.checkpoint.weight_files import some
from quantkit.errors import OutputError

__all__ = ["check", "copy_side_files", "finish", "partial_folder", "prepare", "release"]

_LOCK_FILE = ".quantkit-lock"
_WEIGHTS = (".safetensors", ".gguf")
_MODEL_FOLDERS = ("additional_chat_templates", ".cache")
"""Sub-folders that belong to a model whoever wrote it: of transformers, and of the Hub's downloader. Of others nobody knows what they hold."""
_held: dict[Path, int] = {}


def partial_folder(out: Path) -> Path:
    """Where OUT is built: its sibling OUT.partial.

    Raises:
        OutputError: OUT is the root of a file system.
    """
    target = _target(out)
    return target.with_name(target.name + ".partial")


def check(out: Path, *, overwrite: bool = False) -> None:
    """Refuse what `prepare` would refuse of OUT itself, and create nothing: for before a model is fetched, and for dry runs.

    Raises:
        OutputError: OUT exists, or its place cannot be written.
    """
    target = _target(out)
    _tidy(target)
    _check_target(target, overwrite=overwrite)
    partial = partial_folder(target)
    with disk_errors(partial):
        _check_partial(partial)
        place = next(folder for folder in target.parents if folder.exists())
        if not place.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        if not os.access(place, os.W_OK | os.X_OK, effective_ids=os.access in os.supports_effective_ids):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


def prepare(out: Path, *, overwrite: bool = False, fresh: bool = False) -> Path:
    """Check before any work that OUT can be written, and lock its partial folder until `finish`, `release` or the end of the process.

    Args:
        overwrite: OUT may exist if it is a model; it stays untouched until `finish`.
        fresh: discard what an unfinished run left. Without it, only work that a ledger vouches for is kept.

    Returns:
        The partial folder; it exists.

    Raises:
        OutputError: OUT exists, another run is writing it, or its place cannot be written.
    """
    target = _target(out)
    _tidy(target)
    _check_target(target, overwrite=overwrite)
    partial = partial_folder(target)
    with disk_errors(partial):
        target.parent.mkdir(parents=True, exist_ok=True)
        _check_partial(partial)
        partial.mkdir(exist_ok=True)
        _lock(partial, target)
    try:
        _recover(target)
        _check_target(target, overwrite=overwrite)
        if fresh or not (partial / LEDGER_FILE).exists():
            with disk_errors(partial):
                _clear(partial)
    except BaseException:
        release(partial)
        raise
    return partial


def finish(partial: Path, out: Path, *, overwrite: bool = False) -> None:
    """Make the partial folder durable and rename it to OUT in one step; then release it.

    A model that OUT holds is moved aside first and deleted last, so at every instant the old or the new one is whole on the disk;
    `prepare` puts it back if the machine stops between the two renames. The ledger goes after the rename, since before it a stop would leave
    work that nothing vouches for; the lock file goes last, so that one in OUT tells `prepare` of leftovers to tidy.

    Raises:
        OutputError: OUT has come to exist since `prepare`, or the disk refuses.
    """
    target = _target(out)
    assert partial in _held, "finish without prepare"
    _check_target(target, overwrite=overwrite)
    aside = _aside(target)
    with disk_errors(target):
        _sync_files(partial)
        if target.is_dir() and any(target.iterdir()):
            os.rename(target, aside)
        os.rename(partial, target)
        sync_folder(target.parent)
        _drop_leftovers(target)
    release(partial)


def release(partial: Path) -> None:
    """Let go of the lock; the work in the folder stays for a later run, a folder without any goes. Nothing happens if the lock is not held."""
    descriptor = _held.pop(partial, None)
    if descriptor is None:
        return
    with suppress(OSError):
        if [path.name for path in partial.iterdir()] == [_LOCK_FILE]:
            (partial / _LOCK_FILE).unlink()
            partial.rmdir()
    os.close(descriptor)


def _target(out: Path) -> Path:
    """OUT without symbolic links, so that its sibling is on the same file system."""
    target = Path(os.path.realpath(Path(out).expanduser()))
    if not target.name:
        raise OutputError(f"{out} cannot be an output; name a folder that does not exist yet")
    return target


def _aside(target: Path) -> Path:
    return target.with_name(f".{target.name}.quantkit-replaced")


def _check_target(target: Path, *, overwrite: bool) -> None:
    with disk_errors(target):
        if not target.exists():
            return
        if not target.is_dir():
            raise OutputError(f"{target} is a file; the output is a folder, so choose another name")
        names = sorted(path.name for path in target.iterdir())
    if names and not overwrite:
        raise OutputError(f"{target} exists; choose another name, or replace it with --overwrite")
    if names and not any(name.endswith(_WEIGHTS) for name in names):
        raise OutputError(f"{target} is not a model (it holds {', '.join(names[:5])}), so --overwrite does not delete it; choose another name")
    foreign = [name for name in names if (target / name).is_dir() and name not in _MODEL_FOLDERS]
    if foreign:
        what = f"the folder{'s' if len(foreign) > 1 else ''} {some(foreign, 5)}"
        raise OutputError(f"{target} holds {what}, which --overwrite does not delete; move {'them' if len(foreign) > 1 else 'it'} away first")


def _check_partial(partial: Path) -> None:
    """A folder of this name that no run of ours made is never cleared."""
    if partial.is_dir() and any(partial.iterdir()) and not (partial / _LOCK_FILE).exists():
        raise OutputError(f"{partial} is where the output would be built, and it holds files that quantkit did not write; move it away")


def _lock(partial: Path, target: Path) -> None:
    path = partial / _LOCK_FILE
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        is_current = path.exists() and path.stat().st_ino == os.fstat(descriptor).st_ino
    except BlockingIOError as error:
        os.close(descriptor)
        raise OutputError(f"another run is writing {target} right now; wait for it to end, or choose another output") from error
    if not is_current:
        os.close(descriptor)
        raise OutputError(f"another run has just finished {target}; choose another output, or replace it with --overwrite")
    _held[partial] = descriptor


def _tidy(target: Path) -> None:
    """Do the end of a `finish` that was stopped after OUT became whole; nothing while another run is still at it."""
    if not (target / "config.json").is_file() or not (target / _LOCK_FILE).is_file():
        return
    with disk_errors(target):
        descriptor = os.open(target / _LOCK_FILE, os.O_RDWR)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _drop_leftovers(target)
        except BlockingIOError:
            return
        finally:
            os.close(descriptor)


def _drop_leftovers(target: Path) -> None:
    aside = _aside(target)
    if aside.exists():
        shutil.rmtree(aside)
    for name in (LEDGER_FILE, _LOCK_FILE):
        (target / name).unlink(missing_ok=True)


def _recover(target: Path) -> None:
    """Mend what a stop in the middle of `finish` left: put the old model back if the new one is not there, else delete it."""
    aside = _aside(target)
    if not aside.exists():
        return
    with disk_errors(target):
        if target.exists():
            shutil.rmtree(aside)
        else:
            os.rename(aside, target)


def _clear(partial: Path) -> None:
    for path in partial.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != _LOCK_FILE:
            path.unlink()


def _sync_files(folder: Path) -> None:
    for root, _, names in os.walk(folder):
        for name in names:
            descriptor = os.open(os.path.join(root, name), os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        sync_folder(Path(root))
