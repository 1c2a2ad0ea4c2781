"""The story of convert: a recipe and calibration data turn a checkpoint into a smaller one."""
