"""Evaluation of a checkpoint: from shards to figures that can be compared (`docs/evaluation.md`)."""
