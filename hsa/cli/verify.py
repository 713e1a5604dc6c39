"""The command `hsa verify`."""

from __future__ import annotations

from collections.abc import Mapping
from inspect import Parameter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hsa.actions.keywords import VERIFY
from hsa.actions.source_arguments import missing_sources, source_names
from hsa.cli import options, printing
from hsa.cli.printing import size_text
from hsa.errors import RequestError, one_line
from hsa.findings import Findings
from hsa.methods.all_settings import summary
from hsa.methods.registry import method_named
from hsa.methods.settings import DEFAULT_METHOD
from hsa.option_names import command_line

if TYPE_CHECKING:
    from hsa.verification.verify import VerifyReport

_SOURCE = "With --sources: as for hsa merge; the record says which are needed."
_ID = "With --sources: the id that the record must have for it."


def _before() -> list[Parameter]:
    return list(options.sources(_SOURCE))


def _after() -> list[Parameter]:
    return [*options.run(VERIFY.declared_options()), *options.ids(_ID)]


@options.declares(_before, _after)
def verify(
    ctx: typer.Context,
    output: Annotated[
        Path, typer.Argument(metavar="OUT", help="An output, a patch, or the directory of a sweep or of a release.")
    ],
    sources: Annotated[bool, typer.Option("--sources", help="Merge the sources again and compare every byte.")] = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
    **values: Any,
) -> int:
    """Check what hsa wrote: digests, headers, names, finite targets; with --sources every byte. Exit code 0 or 2."""
    keywords = options.given(ctx, values)
    if sources and not any(name in keywords for name in (*source_names(), "models")):
        named = ", ".join(map(command_line, missing_sources(method_named(DEFAULT_METHOD).contract, ())))
        raise RequestError(f"--sources compares with all sources; add {named}, or each model by --model")
    if not sources and any(name not in VERIFY.options for name in keywords):
        raise RequestError("to compare with the sources, add --sources; without it none is read")
    from hsa.verification.verify import verify as run

    with printing.progress(show=not (quiet or as_json), label="verifying") as step:
        report = run(output, progress=step, **keywords)
    printing.findings(Findings(report.notes), quiet=quiet or as_json)
    if not as_json:
        printing.problems(report)
    printing.result(report.as_dict() if as_json else _describe(report), quiet)
    return 0 if report.ok else 2


def _describe(report: VerifyReport) -> str:
    count = len(report.problems)
    verdict = "sound" if report.ok else f"{count} problem{'s' if count > 1 else ''}"
    lines = [f"{report.output}: {verdict}"]
    record = report.record
    if record is not None:
        lines += [
            "  " + ", ".join(source.identity.named(role) for role, source in record.sources.items()),
            *([f"  {', '.join(named)}"] if (named := _parameters(record.parameters)) else []),
            f"  {record.method.recorded_summary(record.targets).headline}",
        ]
    if report.kind in ("sweep", "release"):
        sound = sum(member.ok for member in report.members)
        lines.append(f"  {report.kind}: {sound} of {len(report.members)} {_MEMBERS[report.kind]} are sound")
    if report.bytes_follow is not None:
        lines.append(
            f"  the bytes {_follow(report.bytes_follow)} from the recorded decisions, which "
            f"{_follow(report.decisions_follow)} from the sources"
        )
    comparison = _COMPARED[report.kind] if report.sources_compared else "not compared with the sources"
    lines.append(
        f"  {report.files} file{'' if report.files == 1 else 's'}, {size_text(report.bytes_read)} read in "
        f"{report.seconds:.2f} s, peak memory {size_text(report.peak_memory_bytes)}; {comparison}"
    )
    return "\n".join(map(one_line, lines))


def _follow(answer: bool | None) -> str:
    return "follow" if answer else "do not follow"


_MEMBERS = {"sweep": "points", "release": "outputs"}
_COMPARED = {
    "output": "every weight recomputed from the sources",
    "patch": "every row recomputed from the sources",
    "sweep": "every point recomputed from the sources",
}


def _parameters(parameters: Mapping[str, Any]) -> list[str]:
    texts = {
        name: "per tensor" if isinstance(value, dict) else str(value)[:40]
        for name, value in summary(parameters).items()
        if value is not None
    }
    return [f"{name} {text}" for name, text in texts.items()]
