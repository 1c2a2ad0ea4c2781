"""Asymmetric calibration (GPTAQ: Li et al., arXiv 2504.02692): a layer is to make of the quantized model's input what the original made of its own.

With o the original model's input and x the one there is, the aim is least ||W o - Q x||^2 over tokens. Its minimum over all Q is
W' = W + W E[(o - x) x^T] E[x x^T]^-1, and what Q loses beyond that is (W' - Q) E[x x^T] (W' - Q)^T, the plain objective about W'. So what layers
before have lost is made up for by rounding W' in place of W; the paper does the same column by column, within GPTQ.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantkit.errors import CalibrationError


def propagated(weight: Tensor, drift: Tensor, factor: Tensor, order: Tensor, *, share: float) -> Tensor:
    """The weight [N, K] that makes up for the drift of its input, as far as the input tells.

    Args:
        drift: [K, K], the mean of (o - x) x^T.
        factor: the upper U [K, K] with U^T U = E[x x^T]^-1, rows and columns in an order of their own.
        order: int64 [K], which column stands where in that order.
        share: how much of the correction is made. All of it fits the calibration text's drift too closely, and others' less.

    Raises:
        CalibrationError: the drift is not finite.
    """
    if not bool(torch.isfinite(drift).all()):
        raise CalibrationError("its input has drifted from the original model's beyond what float32 holds; use more bits in the layers before")
    correction = (weight @ drift)[:, order] @ factor.T @ factor
    return weight + share * correction[:, torch.argsort(order)]
