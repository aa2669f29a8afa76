"""Report labeler: reads findings and sides in a chest-CT report, by rules or a classifier."""
