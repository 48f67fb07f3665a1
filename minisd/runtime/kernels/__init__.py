"""Attention, in every form that minisd has of it. README.md beside this file walks from the formula to the kernels."""

from minisd.runtime.kernels.attention import IMPLEMENTATIONS, attention
from minisd.runtime.kernels.probe import attention_with_lse, weights_from_lse

__all__ = ["IMPLEMENTATIONS", "attention", "attention_with_lse", "weights_from_lse"]
