"""The version of mmjax."""

__version__ = "0.1.0"
