"""The command line: agd-fast demo | distill | estimate | sample | evaluate | convert | push | info; one command a file."""

from agd_fast.cli.commands import app, main

__all__ = ["app", "main"]
