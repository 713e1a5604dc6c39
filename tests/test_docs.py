"""The site builds without a warning, links lead somewhere, and pages say what the code does."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import hsa

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
MOST_LINES = 130
"""Of the README."""

LINK = re.compile(r"\]\(([^)\s]+)\)")


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    """In strict mode a broken link, a missing anchor, and a page that the navigation leaves out are errors."""
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")],
        cwd=ROOT, capture_output=True, text=True, check=False, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    pages = {path.parent.name for path in (tmp_path / "site").rglob("index.html")}
    assert {"quickstart", "tutorial", "cli", "python", "search"} <= pages
    assert not list((tmp_path / "site").rglob("*.py"))
    loaded = re.compile(r"""(?:src|href)=["']?(https?://[^"'\s>]+\.(?:js|css|woff2?))""")
    fetched = [
        found for path in (tmp_path / "site").rglob("*.html") for found in loaded.findall(path.read_text("utf-8"))
    ]
    assert not fetched, "pages load nothing from other hosts"


def test_the_page_of_the_command_line_is_what_help_prints() -> None:
    done = subprocess.run(
        [sys.executable, str(DOCS / "cli_page.py"), "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_page_of_python_has_every_public_name() -> None:
    described = re.findall(r"^::: hsa\.(\w+)$", (DOCS / "python.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(described) == sorted(hsa.__all__)


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= MOST_LINES


@pytest.mark.parametrize("name", sorted(path.name for path in ROOT.glob("*.md")))
def test_links_of_the_repositorys_own_pages_lead_to_files(name: str) -> None:
    for target in LINK.findall((ROOT / name).read_text(encoding="utf-8")):
        if not target.startswith(("http://", "https://", "#", "mailto:")):
            assert (ROOT / target.partition("#")[0]).exists(), f"{name} links to {target}"


def test_nothing_refers_to_a_document_that_nobody_has() -> None:
    for folder in ("hsa", "kernels", "docs", "tests", "bench", "examples"):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in (".py", ".md", ".yaml", ".toml") and path != Path(__file__):
                assert "SPEC section" not in path.read_text(encoding="utf-8"), path
