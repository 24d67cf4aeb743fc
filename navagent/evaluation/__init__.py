"""Metrics with intervals, maps, videos and reports."""
