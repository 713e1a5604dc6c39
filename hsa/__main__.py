"""The entry point: `python -m hsa`, and the `hsa` command."""

from __future__ import annotations

import sys


def main() -> None:
    try:
        from hsa.cli.app import run
        from hsa.system.console import exit_with
    except KeyboardInterrupt:
        if sys.stderr is not None:
            print("hsa: error: interrupted; nothing half done was left behind", file=sys.stderr)
        sys.exit(130)
    exit_with(lambda: run(sys.argv[1:]))


if __name__ == "__main__":
    main()
