"""A training step on the meta device: bytes and FLOPs without computing a number."""
