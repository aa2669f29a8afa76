"""How a run survives: saving, resuming, exit codes, signals, the watchdog, steps that are skipped."""
