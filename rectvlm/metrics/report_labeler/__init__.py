"""Report labeler: findings and their sides in the text of a chest-CT report, by rules or a classifier."""
