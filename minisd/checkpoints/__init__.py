"""Checkpoint files: safe reading and writing, official names against ours, adapters."""
