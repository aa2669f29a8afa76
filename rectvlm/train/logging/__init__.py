"""What a run writes and shows: run log, console, metadata, trackers, and figures."""
