"""Genome -> objectives, by one process or many, with what sub-networks have in common run once."""
