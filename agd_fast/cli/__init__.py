"""The command line: agd-fast demo | distill | estimate | sample | evaluate | convert | push | info; one command a file.

A command imports torch, and what stands on it, where it runs: `--help` does not wait for them.
"""

from agd_fast.cli.commands import app, main

__all__ = ["app", "main"]
