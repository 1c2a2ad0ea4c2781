"""Quantize language models, prove what it cost, serve the result."""
__version__ = "0.1.0"
