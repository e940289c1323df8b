"""The command line: agd-fast demo | distill | estimate | sample | evaluate | convert | push | info; one command per file.

A command imports torch, and what depends on it, only when it runs, so `--help` does not wait for these imports.
"""

from agd_fast.cli.commands import app, main

__all__ = ["app", "main"]
