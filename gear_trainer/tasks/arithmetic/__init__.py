"""Sums in one turn."""
