"""Lesion and region masks of every source, brought onto a volume's grid."""
