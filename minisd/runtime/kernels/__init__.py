"""Attention, in every implementation that minisd has of it. README.md here walks from the formula to the kernels."""

from minisd.runtime.kernels.attention import IMPLEMENTATIONS, attention

__all__ = ["IMPLEMENTATIONS", "attention"]
