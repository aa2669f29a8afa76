"""The engine: the only room that knows Accelerate and DeepSpeed."""
