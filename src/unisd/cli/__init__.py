"""`unisd`: parse, call, print."""

from unisd.cli.main import main

__all__ = ["main"]
