"""The table that the fault suite ends with."""

from __future__ import annotations

import pytest
from fault_harness import FULL, TABLE, table


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not TABLE:
        return
    form = "every point" if FULL else "a sample; make test-faults tries every point"
    terminalreporter.section(f"faults ({form})")
    for line in table():
        terminalreporter.write_line(line)
