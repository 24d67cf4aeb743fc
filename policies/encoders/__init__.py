"""Perception networks, one file a family."""
