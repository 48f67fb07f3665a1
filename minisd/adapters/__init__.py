"""What is added to a loaded model: LoRAs and textual-inversion embeddings, read, merged, restored and written."""
