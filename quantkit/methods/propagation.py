"""Asymmetric calibration (GPTAQ: Li et al., arXiv 2504.02692): a layer is to make of the quantized model's input what the original made of its own.

With the original input o and the one there is x, the aim is least ||W o - Q x||^2 over tokens. Its minimum over all Q is
W + W E[(o - x) x^T] E[x x^T]^-1, and what Q loses beyond that is the plain objective (W' - Q) E[x x^T] (W' - Q)^T about that W'. So errors of the
layers before are taken up by giving any calibrated rounding W' for W; the paper does the same column by column, within GPTQ.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantkit.errors import CalibrationError


def propagated(weight: Tensor, hessian: Tensor, drift: Tensor, *, damp: float, share: float) -> Tensor:
    """The weight [N, K] that makes up for its input's drift, as far as its input tells.

    Args:
        hessian: [K, K], the mean of x x^T.
        drift: [K, K], the mean of (o - x) x^T.
        damp: share of the mean diagonal that is added to the Hessian: it holds the answer to the weight where little is known.
        share: how much of the correction is made.

    Raises:
        CalibrationError: the damped Hessian is not positive definite, or the drift not finite.
    """
    if not bool(torch.isfinite(drift).all()):
        raise CalibrationError("its input has drifted beyond all measure from the original model's; use more bits, or gptq without propagate")
    dtype = torch.float64 if hessian.device.type == "cpu" else hessian.dtype
    damped = hessian.to(dtype, copy=True)
    damped.diagonal().add_(damp * hessian.diagonal().mean())
    lower, failed = torch.linalg.cholesky_ex(damped)
    if failed:
        raise CalibrationError(f"the Hessian of its inputs is not positive definite at a damping of {damp:g}; use a larger one")
    wanted = (weight @ drift).to(dtype)
    return weight + share * torch.cholesky_solve(wanted.T, lower).T.to(weight.dtype)
