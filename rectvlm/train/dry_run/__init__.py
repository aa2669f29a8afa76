"""A training step on the meta device: bytes and FLOPs without numbers."""
