"""Float bundle and video clips -> scales -> quantised bundle, without torch; the command is ``python -m calibration``."""
