"""Evaluation of a checkpoint: from shards to comparable figures (`docs/concepts/evaluation.md`)."""
