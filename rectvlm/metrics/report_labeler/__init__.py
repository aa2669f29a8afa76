"""Labelers: which of the 18 findings a radiology report states, denies or leaves open."""
