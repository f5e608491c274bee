"""The version, apart from the package so that a build need not import JAX."""

__version__ = "0.1.0"
