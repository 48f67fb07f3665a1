"""CLIP's language: byte pairs, tokenizer, prompt syntaxes, and the way from a prompt to its context."""
