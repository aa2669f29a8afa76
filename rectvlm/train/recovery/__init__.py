"""How a run survives: saving, resuming, exit codes, signals, the watchdog, and bad steps."""
