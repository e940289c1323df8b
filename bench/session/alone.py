"""Runs a command that takes times from beginning to end: all others of the session are stopped meanwhile.

python -m session.alone LOCK COMMAND...    # in bench/
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from speed.hardware import quiet


def main() -> None:
    lock, *command = sys.argv[1:]
    with quiet(Path(lock)):
        code = subprocess.run(command).returncode
    sys.exit(code)


if __name__ == "__main__":
    main()
