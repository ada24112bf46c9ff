"""Clips to scales to quantised graphs. Nothing is here yet: see the support table in README."""
