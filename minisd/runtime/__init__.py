"""What makes the networks quick or small, and changes their results by rounding at most. Enters by `optimize`."""
