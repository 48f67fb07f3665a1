"""Measuring pictures: reconstruction, retrieval, Fréchet distance, fidelity to a subject, each with an interval."""
