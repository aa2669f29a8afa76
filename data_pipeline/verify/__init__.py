"""Shards read back, checked and described."""
