"""The entry point: `python -m hsa`, and the `hsa` command."""

from __future__ import annotations

import sys


def main() -> None:
    try:
        from hsa.cli import run
        from hsa.console import finish
    except KeyboardInterrupt:
        print("hsa: error: interrupted; nothing was left behind", file=sys.stderr)
        sys.exit(130)
    finish(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
