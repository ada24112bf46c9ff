"""Float bundle and video clips -> scales -> quantised bundle, without torch: ``python -m calibration``."""
