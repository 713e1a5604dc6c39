"""How much of the largest sets of cases a run tries: a sample, as `make test` does, or all, as `make test-all`."""

from __future__ import annotations

import os

EVERYTHING = os.environ.get("HSA_TESTS") == "all"
