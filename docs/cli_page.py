"""Write docs/cli.md: what `--help` prints for every command.

    python docs/cli_page.py [--check]

--check writes nothing, and exits with 1 if the page differs from what the commands print.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import sys
from pathlib import Path

PAGE = Path(__file__).resolve().parent / "cli.md"

HEAD = """# Command line

This page is what `--help` prints. `hsa help COMMAND` prints the same on a terminal, and `hsa --install-completion` lets
your shell complete commands and options.

| exit code | meaning |
|---|---|
| 0 | success |
| 1 | the machine or the network failed, such as a full disk |
| 2 | a bad request or bad input |
| 130, 143 | interrupted by SIGINT (Ctrl-C) or SIGTERM |

An error is one line that says what is wrong, where, and what to do. [Troubleshooting](troubleshooting.md) explains each
kind.
"""


def printed(*arguments: str) -> str:
    """What hsa prints on a terminal of 80 columns."""
    from hsa.cli import app

    stream = io.StringIO()
    with contextlib.redirect_stdout(stream):
        code = app.run(list(arguments))
    assert code == 0, (arguments, code)
    return "\n".join(line.rstrip() for line in stream.getvalue().strip("\n").splitlines())


def page() -> str:
    """The text of the page."""
    os.environ["COLUMNS"] = "80"
    from hsa.cli import app

    parts = [HEAD, f"## hsa\n\n```text\n{printed('--help')}\n```\n"]
    for command in app.program().commands:
        parts.append(f"## hsa {command}\n\n```text\n{printed(command, '--help')}\n```\n")
    return "\n".join(parts)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if the page is stale")
    options = parser.parse_args()
    text = page()
    if not options.check:
        PAGE.write_text(text, encoding="utf-8")
    elif not PAGE.is_file() or PAGE.read_text(encoding="utf-8") != text:
        print(f"{PAGE}: stale; run make docs", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
