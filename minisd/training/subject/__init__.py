"""Teach a model one subject from a few photos: DreamBooth, LoRA, Textual Inversion."""
