"""The engine: the only package that knows Accelerate and DeepSpeed."""
