"""From files to samples and from samples to batches: volumes, shards, loading, augmentation."""
