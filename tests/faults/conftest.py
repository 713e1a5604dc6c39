"""The table that the fault suite ends with."""

from __future__ import annotations

import pytest
from fault_harness import FULL, TABLE, table


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not TABLE:
        return
    form = "in full" if FULL else "a sample; make test-faults tries them in full"
    terminalreporter.section(f"faults ({form})")
    for line in table():
        terminalreporter.write_line(line)
