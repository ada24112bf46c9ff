"""The release, read by the build and written into bundles."""

__version__ = "0.1.0"
