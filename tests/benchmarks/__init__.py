"""Measurements too long for the suite; each prints a table and ends in one JSON line."""
