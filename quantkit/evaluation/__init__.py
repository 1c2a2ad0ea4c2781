"""The story of evaluation: what a quantized model lost, measured."""
