"""Calibration data as its users have it, turned into rows of tokens that never leak from one document into another."""

from .data import CalibrationReport, CalibrationSet
from .load import load_calibration
from .options import CalibrationOptions
from .packing import CHAT_FALLBACK
from .sources import KNOWN_DATASETS

__all__ = ["CHAT_FALLBACK", "KNOWN_DATASETS", "CalibrationOptions", "CalibrationReport", "CalibrationSet", "load_calibration"]
