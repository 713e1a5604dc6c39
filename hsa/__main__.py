"""The entry point: `python -m hsa`, and the `hsa` command."""

from __future__ import annotations

import sys


def main() -> None:
    from hsa.cli import run

    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
