"""The version: of the package, and of what a template must speak."""

__version__ = "0.1.0"
