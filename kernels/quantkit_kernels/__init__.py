"""Kernels for low-bit models: the meaning of every operator in plain torch (`reference`), and native ones beside it. Nothing of quantkit here."""
