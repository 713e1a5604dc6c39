"""The entry point: `python -m hsa`, and the `hsa` command."""

from __future__ import annotations

import signal
import sys


def main() -> None:
    try:
        from hsa.cli import SIGNALS, run
    except KeyboardInterrupt:
        print("hsa: error: interrupted; nothing was left behind", file=sys.stderr)
        sys.exit(130)
    code = run(sys.argv[1:])
    for number in SIGNALS:  # Python lets go of its handlers before it ends: a late signal would change the exit code
        signal.signal(number, signal.SIG_IGN)
    sys.exit(code)


if __name__ == "__main__":
    main()
