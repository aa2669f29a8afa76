"""Checkpoints and exported models: the folder format, its integrity, the model card, the Hub."""
