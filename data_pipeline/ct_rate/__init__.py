"""A CT-RATE download: its tables, its volumes, and the cases that they make."""
