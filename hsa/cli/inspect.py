"""The command `hsa inspect`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from inspect import Parameter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hsa.actions.keywords import INSPECT
from hsa.cli import options, printing
from hsa.findings import Findings
from hsa.methods.settings import Declared
from hsa.option_names import command_line

if TYPE_CHECKING:
    from hsa.inspection.diff import Comparison
    from hsa.inspection.inspect import Inspection, ModelInspection
    from hsa.verification.verify import VerifyReport


def _before() -> list[Parameter]:
    return [*options.sources("As for merge; all of them or none."), options.method(given=False)]


def _after() -> list[Parameter]:
    return [*options.settings(INSPECT, _default_text), *options.run(INSPECT.declared_options())]


def _default_text(setting: Declared, text: str) -> str:
    return text if setting.about.structural else f"the output's, else {text}"


@options.declares(_before, _after)
def inspect(
    ctx: typer.Context,
    output: Annotated[
        str | None,
        typer.Argument(metavar="OUT", help="A finished output; its files are verified, unless --no-verify."),
    ] = None,
    diff: Annotated[tuple[str, str] | None, typer.Option(metavar="A B", help="Compare two outputs instead.")] = None,
    no_energy: Annotated[
        bool, typer.Option("--no-energy", help="Of HSA: read the targets alone, not the rest of the models.")
    ] = False,
    no_verify: Annotated[
        bool, typer.Option("--no-verify", help="With OUT: do not read its files to see whether they are as written.")
    ] = False,
    csv: Annotated[
        str | None, typer.Option(metavar="F", help="Write a row for each head.", rich_help_panel=options.OUTPUT)
    ] = None,
    png: Annotated[
        str | None,
        typer.Option(metavar="F", help="Write heat maps (needs matplotlib).", rich_help_panel=options.OUTPUT),
    ] = None,
    html: Annotated[
        str | None,
        typer.Option(
            metavar="F", help="Write a page whose heat maps answer to sliders.", rich_help_panel=options.OUTPUT
        ),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace files that exist.")] = False,
    wide: Annotated[
        bool,
        typer.Option(
            "--wide", help="Show every column of the tables, however wide they are.", rich_help_panel=options.OUTPUT
        ),
    ] = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
    **values: Any,
) -> int:
    """Show what a merge does and why, such as which heads it selects: of sources, of an output, or of two. Exit code
    0 or 2."""
    from hsa.errors import RequestError

    bars = not (quiet or as_json)
    paths = {"csv": csv, "png": png, "html": html}
    keywords = options.given(ctx, values)
    if diff is not None:
        files_asked = [f"--{name}" for name, path in paths.items() if path is not None]
        surplus = [*(["OUT"] if output is not None else []), *map(command_line, keywords), *files_asked]
        if surplus:
            raise RequestError(f"--diff A B goes with --json alone, not with {', '.join(surplus)}; leave them out")
        from hsa.inspection.diff import compare

        with printing.progress(show=bars, label="comparing") as step:
            compared = compare(*diff, progress=step)
        _present(compared, as_json, quiet, wide=wide)
        return 0

    from hsa.inspection.inspect import inspect as inspect_
    from hsa.inspection.inspect import shows_heads
    from hsa.views import picture
    from hsa.views.files import check_file

    protected = [path for path in (output, *options.source_paths(keywords)) if path is not None]
    files = {name: check_file(path, protected, overwrite=overwrite) for name, path in paths.items() if path is not None}
    if len(set(files.values())) < len(files):
        raise RequestError("two of --csv, --png and --html name one file; give each its own")
    if png is not None:  # what cannot be drawn is said before anything is read
        picture.check_installed()
        if not shows_heads(output, keywords.get("method")):
            raise RequestError("--png draws heads, and this method selects none; give --html or --csv")
    with printing.progress(show=bars, label="inspecting") as step:
        inspection = inspect_(output, energy=not no_energy, progress=step, **keywords)
    written = _write(inspection, files, protected, overwrite=overwrite)
    verified = None
    if output is not None and not no_verify:
        from hsa.verification.verify import verify

        with printing.progress(show=bars, label="verifying") as step:
            verified = verify(output, progress=step)
    _present(inspection, as_json, quiet, written, verified, wide=wide)
    return 0 if verified is None or verified.ok else 2


def _pages(inspection: Inspection | ModelInspection, name: str) -> Mapping[str, bytes]:
    """An inspection in a format: the bytes of each of its pages by the page's name, empty for the first."""
    from hsa.inspection.inspect import Inspection
    from hsa.views import csv_file, model_csv, page, picture

    if name == "html":
        return {"": page.render(inspection)}
    if isinstance(inspection, Inspection):
        return picture.render(inspection) if name == "png" else {"": csv_file.render(inspection)}
    return {"": model_csv.render(inspection)}


def _write(
    inspection: Inspection | ModelInspection,
    files: Mapping[str, Path],
    protected: Sequence[str],
    *,
    overwrite: bool,
) -> dict[str, tuple[Path, ...]]:
    """Write every page of every format: `heads.png`, and for further pages `heads-NAME.png`. Returns their paths.

    No file is written before every place was checked.
    """
    from hsa.views.files import check_file, write_file

    pages: dict[str, dict[Path, bytes]] = {}
    for name, first in files.items():
        page_paths = {
            first.with_stem(f"{first.stem}-{page}") if page else first: data
            for page, data in _pages(inspection, name).items()
        }
        pages[name] = {check_file(path, protected, overwrite=overwrite): data for path, data in page_paths.items()}
    for written in pages.values():
        for path, data in written.items():
            write_file(path, data)
    return {name: tuple(written) for name, written in pages.items()}


def _present(
    view: Inspection | ModelInspection | Comparison,
    as_json: bool,
    quiet: bool,
    files: dict[str, tuple[Path, ...]] | None = None,
    verified: VerifyReport | None = None,
    *,
    wide: bool = False,
) -> None:
    from hsa.errors import one_line
    from hsa.views import table

    written = [path for paths in (files or {}).values() for path in paths]
    finished = f"{', '.join(map(str, written))} {'is' if len(written) == 1 else 'are'} whole" if written else ""
    printing.findings(Findings(view.notes, getattr(view, "warnings", ())), quiet=quiet)
    if verified is not None:
        printing.findings(Findings(verified.notes), quiet=quiet)
        if not as_json:
            printing.problems(verified)
    if as_json:
        extra: dict[str, Any] = (
            {"written": {name: [*map(str, paths)] for name, paths in files.items()}} if files else {}
        )
        if verified is not None:
            verification = verified.as_dict()
            extra["verification"] = {
                name: verification[name] for name in ("ok", "problems", "notes", "files", "bytes_read")
            }
        printing.result({**view.as_dict(), **extra}, quiet, done=finished)
    elif not quiet:
        lines = [table.render(view, wide=wide)]
        if verified is not None:
            hashed = all((getattr(view, "files", None) or {"": None}).values())
            lines.append(_verdict(verified, hashed))
        lines += [one_line(f"written: {path}") for path in written]
        printing.result("\n".join(lines), quiet, done=finished)


def _verdict(verified: VerifyReport, hashed: bool) -> str:
    """Whether the bytes are what was written, as far as that can be told."""
    if not verified.ok:
        count = len(verified.problems)
        return f"bytes: not what was written, {count} problem{'s' * (count > 1)}"
    if not hashed:
        return f"bytes: {verified.files} files read, no problem found; without digests no more can be told"
    return f"bytes: still what was written, {verified.files} files read"
