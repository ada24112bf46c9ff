"""The LLMs of the backbones, one file of facts each, all of them configurations of ``export.decoder``."""
