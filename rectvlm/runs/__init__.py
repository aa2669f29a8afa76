"""What runs have left: listed, compared, and drawn as curves."""
