"""Vision towers, one per file: normalised frames (F, 3, H, W) -> patch features (F, P, E)."""
