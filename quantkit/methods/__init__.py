"""How weights become quantized tensors: pure functions of tensors, no files, no models."""

from quantkit.methods.base import Rounding, Statistics
from quantkit.methods.registry import ROUNDINGS, get_rounding

__all__ = ["ROUNDINGS", "Rounding", "Statistics", "get_rounding"]
