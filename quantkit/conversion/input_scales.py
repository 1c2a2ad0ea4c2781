"""The calibrated scale of each input that a scheme quantizes by a stored one: its largest magnitude over the largest level.

Layers that engines feed by one scale share the largest of theirs, so that an expert which no calibration token reached has its siblings'.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import isfinite

import torch
from torch import Tensor

from quantkit.conversion.layer_plan import LayerPlan
from quantkit.core.activations import top_of
from quantkit.core.scales import stored_scale
from quantkit.errors import CalibrationError
from quantkit.formats.fusion import with_one_input_scale
from quantkit.methods.base import Statistics

Peaks = Mapping[str, float]
"""The largest magnitude seen at each layer's input, by the layer's name; of those that a token reached."""


def peaks_of(groups: Iterable[tuple[list[str], Statistics | None]]) -> dict[str, float]:
    """From statistics that know the largest magnitude of each channel."""
    seen = [(names, found.largest) for names, found in groups if found is not None and found.largest is not None]
    return {name: float(largest.max()) for names, largest in seen for name in names}


def input_scales(layers: Sequence[LayerPlan], peaks: Peaks, dtype: torch.dtype) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The scale [1] of every static input among the layers of a block, as `dtype` stores it, and a note for each that was taken from others.

    Raises:
        CalibrationError: nothing is known of an input, or it was infinite.
    """
    static = {layer.linear.name: layer.scheme for layer in layers if layer.scheme.is_static}
    scales, notes = {}, {}
    for names in with_one_input_scale(static):
        known = [peaks[name] for name in names if peaks.get(name)]
        if not known:
            raise CalibrationError(
                f"no calibration token gives {names[0]} an input other than zero, so {static[names[0]].name} has no scale for it; "
                f"calibrate on more text, or give it a scheme that measures inputs at run time: --override '{names[0]}$=fp8-dynamic'"
            )
        if not all(map(isfinite, known)):
            raise CalibrationError(f"the input of {names[0]} is infinite or NaN on calibration data; the model is most likely damaged")
        for name in names:
            activation = static[name].activation
            assert activation is not None
            scales[name] = stored_scale(torch.tensor([max(known) / top_of(activation)]), dtype).to(dtype)
            if not peaks.get(name):
                notes[name] = "no calibration token reached its input, so it has the scale of its siblings'"
    return scales, notes
