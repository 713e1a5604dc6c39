"""`hsa.inspect`: what a merge of sources would do and why, or what a finished output records."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hsa.actions.keywords import INSPECT, NamedArguments, check_keywords, split_named
from hsa.actions.recorded_sources import recorded_sources
from hsa.actions.signatures import declared_keywords
from hsa.actions.source_arguments import missing_sources
from hsa.arguments import check_flags, check_functions, check_paths
from hsa.errors import RequestError, listed, shown
from hsa.inspection.from_provenance import changed_config, inspect_provenance, recorded_config
from hsa.inspection.heads import inspect_heads
from hsa.inspection.model_report import ModelInspection
from hsa.inspection.models import RecordedMerge, inspect_record, inspect_sources
from hsa.inspection.report import Agreement, Energy, Inspection, TensorInspection
from hsa.methods.base import BASE, Method
from hsa.methods.geometry import Geometry
from hsa.methods.hsa import HsaSettings
from hsa.methods.registry import method_named
from hsa.methods.settings import DEFAULT_METHOD
from hsa.option_names import option
from hsa.outputs import provenance
from hsa.sources.roles import Role
from hsa.system.fsio import Tally
from hsa.system.manifest import PROVENANCE
from hsa.system.threads import check_threads
from hsa.system.types import PathLike, Progress

__all__ = ["Agreement", "Energy", "Geometry", "Inspection", "ModelInspection", "TensorInspection", "inspect"]


@declared_keywords(INSPECT)
def inspect(
    output: PathLike | None = None, *, energy: bool = True, progress: Progress | None = None, **keywords: Any
) -> Inspection | ModelInspection:
    """Inspect what a merge does and why, from its sources, its finished output, or both.

    For HSA, returns an `Inspection`: scores, selection, margins and task vectors of every head. For a method that
    merges whole models, returns a `ModelInspection`: norms and cosines of task vectors, sign conflicts, the shares that
    are kept, and coefficients.

    Give all sources or none, by role as for `hsa.merge`, or as `models` in their order. With `output`, they must be the
    sources that it was made from. They add what a provenance does not contain: cosines, norms, relative sizes. The
    default settings are the output's own, or those of `hsa.merge`. Settings that shape the plan of a merge cannot
    differ from the output's; for a merge of whole models, no setting can. Methods that take no base accept one here, to
    show task vectors.

    Args:
        output: a directory that `hsa.merge` wrote; without sources, only its provenance is read.
        {sources}
        method: the merge method, by default HSA or the output's own.
        {settings}
        {options}
        energy: for HSA, read local sources whole to find the share of each task vector inside the targets. It is left
            out for sources on the Hub, of which only targets are fetched.
        progress: called now and then with the bytes done and the total bytes.

    Decisions are those of `hsa.merge`, bit for bit; HSA's scores are those of exact numerics. Memory holds one target
    at a time, or slices of some tensors and the data that a merge keeps between its passes. The warnings are those that
    a merge of the sources would give for their values, their adapters and the parameters. A further warning says why a
    merge would refuse the sources if a config.json does not match the tensors.

    Raises RequestError, SourceError, MachineError or a subclass; MismatchError if the sources are not the output's.

    Example:
        >>> found = hsa.inspect("merged")
        >>> found.origin, found.parameters["k"]
        ('output', 0.6)
    """
    check_keywords(INSPECT, keywords)
    check_flags(energy=energy)
    check_functions(progress=progress)
    recorded = None if output is None else _load(output)
    method = _method(keywords.get("method"), recorded)
    given = split_named(INSPECT, keywords, method.name)
    given.check_types()
    check_threads(given.options.get("threads"))
    if method.selects_heads:
        return _heads(given, recorded, energy, progress)
    return _models(method, given, recorded, progress)


def shows_heads(output: PathLike | None, method: str | None) -> bool:
    """Whether an inspection of an output or for a method shows heads. Raises RequestError and ProvenanceError."""
    return _method(method, None if output is None else _load(output)).selects_heads


def _load(output: PathLike) -> RecordedMerge:
    check_paths(output=output)
    directory = Path(output).expanduser()
    return RecordedMerge(directory, provenance.load(directory))


def _method(name: str | None, recorded: RecordedMerge | None) -> Method[Any, Any]:
    """The method of the output, or else the one with this name."""
    if recorded is None:
        return method_named(DEFAULT_METHOD if name is None else name)
    own = recorded.provenance.record.method
    if name is not None and name != own.name:
        raise RequestError(
            f"{recorded.directory} was merged by method {own.name}, not by {shown(name)}; leave out {option('method')}"
        )
    return own


def _heads(
    given: NamedArguments, recorded: RecordedMerge | None, energy: bool, progress: Progress | None
) -> Inspection:
    values = given.settings
    if recorded is None:
        paths = _sources_of(method_named(DEFAULT_METHOD), given)
        return inspect_heads(paths, HsaSettings(**values), None, None, energy, progress)
    record, directory = recorded.provenance, recorded.directory
    structural = [each.name for each in INSPECT.settings_of(HsaSettings) if each.about.structural]
    if any(name in values for name in structural):
        raise RequestError(f"{listed(map(option, structural))} are recorded in an output; leave them out")
    config = recorded_config(record, directory)
    shown_config = changed_config(config, values)
    if given.sources:
        paths = recorded_sources(record.record, given, directory)[0]
        return inspect_heads(paths, shown_config, record, directory, energy, progress)
    tally = Tally()
    tally.add_read("output", (directory / PROVENANCE).stat().st_size)
    return inspect_provenance(record, directory, config, shown_config, tally)


def _models(
    method: Method[Any, Any], given: NamedArguments, recorded: RecordedMerge | None, progress: Progress | None
) -> ModelInspection:
    threads = given.options.get("threads")
    if recorded is None:
        paths = _sources_of(method, given)
        return inspect_sources(method, method.Settings(**given.settings), paths, None, threads, progress)
    if given.settings:
        raise RequestError(
            f"{listed(map(option, given.settings))}: settings of method {method.name} are recorded in an output; leave "
            f"them out, or inspect the sources without the output"
        )
    if not given.sources:
        return inspect_record(recorded)
    paths = recorded_sources(recorded.provenance.record, given, recorded.directory)[0]
    settings = recorded.provenance.record.settings
    return inspect_sources(method, settings, paths, recorded, threads, progress)


def _sources_of(method: Method[Any, Any], given: NamedArguments) -> Mapping[Role, PathLike]:
    """The sources that are given without an output, by the roles of a method. A base is accepted even if the method
    takes none."""
    contract = method.contract
    paths, _, left = given.by_roles(contract)
    together = listed(map(option, missing_sources(contract, ())))
    if not given.sources:
        raise RequestError(f"there is nothing to inspect; give an output, or {together}")
    if left:
        raise RequestError(f"method {method.name} has no {option(left[0])}; give its sources by {together}")
    missing = missing_sources(contract, paths if contract.named else given.sources)
    if missing:
        raise RequestError(f"{' and '.join(map(option, missing))} not given; {together} are needed together")
    based = BASE in paths and contract.base != "none"
    contract.check(method.name, base=based, models=sum(role != BASE for role in paths))
    return paths
