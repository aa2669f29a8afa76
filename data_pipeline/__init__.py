"""From other people's files to shards. Run from the checkout; not installed."""
