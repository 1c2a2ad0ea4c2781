"""Where models are run."""

from __future__ import annotations

import torch

from quantkit.errors import UsageError


def find_device(name: str) -> torch.device:
    """The device of this name; "auto" is a GPU where there is one.

    Raises:
        UsageError: this machine has no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).tolist()
    except (RuntimeError, AssertionError) as error:
        here = ["auto", "cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
        reason = str(error).splitlines()[0].partition(" device type at start")[0]
        raise UsageError(f"device {name!r} cannot be used here ({reason}); use {' or '.join(here)}") from error
    return device
