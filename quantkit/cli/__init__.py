"""The command line: one command a file, loaded when it is asked for, so that help answers at once."""

from quantkit.cli.main import main

__all__ = ["main"]
