"""Training runs read from their folders: listed, compared and drawn as curves."""
