"""Numbers: how tensors are quantized, packed and compared. No files, no models."""
