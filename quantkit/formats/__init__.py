"""Containers: how quantized tensors are laid out in files, encode and decode, names and configuration."""

from quantkit.formats.registry import FORMATS, get_format

__all__ = ["FORMATS", "get_format"]
