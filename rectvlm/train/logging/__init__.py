"""What a run writes down and shows: run log, console, metadata, trackers, figures."""
