"""Attention, in every form that minisd has of it."""

from minisd.kernels.attention import IMPLEMENTATIONS, attention

__all__ = ["IMPLEMENTATIONS", "attention"]
