"""Synthetic chest CTs whose truth is known."""
