"""The version of this library; built packages read it here."""

__version__ = "2.0.0.dev0"
