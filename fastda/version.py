"""The version, which the package, its metadata and the build stamp share."""

__version__ = "0.1.0"
