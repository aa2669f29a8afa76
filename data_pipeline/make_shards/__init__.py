"""Cases to shards: the plan, the workers that carry it out, and their progress."""
