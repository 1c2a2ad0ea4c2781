"""The reference model: what it is trained on, how, and what it scores. The model itself lies in `model/`, its held-out data in `splits/`."""
