"""A checkpoint of any container made ready to be streamed block by block."""

from __future__ import annotations

from pathlib import Path

from quantkit.formats.opened import OpenedCheckpoint
from quantkit.models.architecture import describe, load_config
from quantkit.models.compare import StreamedModel


def open_streamed(folder: Path, label: str, *, trust_remote_code: bool = False) -> StreamedModel:
    """Reads headers and builds the model without weights; raises what OpenedCheckpoint, `load_config` and `describe` raise."""
    opened = OpenedCheckpoint(folder)
    config = load_config(folder, trust_remote_code=trust_remote_code)
    return StreamedModel(describe(config, opened, trust_remote_code=trust_remote_code), opened, opened.schemes, label)
