"""Match the sources given for an output with those that its record names, whatever method merged them."""

from __future__ import annotations

from pathlib import Path

from hsa.actions.keywords import NamedArguments
from hsa.errors import RequestError, listed
from hsa.option_names import option
from hsa.outputs.record import Record
from hsa.sources.roles import Role
from hsa.system.types import PathLike


def recorded_sources(
    record: Record, given: NamedArguments, output: Path
) -> tuple[dict[Role, PathLike], dict[Role, str | None]]:
    """The sources of a call, and the ids for them, by the roles that the record of an output names.

    Models given in order get the roles that the method gives them. Raises RequestError, which names the recorded roles,
    if a source is missing or is not one of those that were merged.
    """
    sources, ids, left = given.by_roles(record.method.contract)
    roles = list(record.sources)
    foreign = [role for role in sources if role not in roles]
    foreign += [option(f"{role}_id") for role in ids if role not in roles] + list(map(option, left))
    missing = [role for role in roles if role not in sources]
    if foreign:
        raise RequestError(f"{_merged_from(record, output)}; {_are(foreign)} none of these{_hint(record)}")
    if missing:
        raise RequestError(
            f"{_merged_from(record, output)}; {_are(missing)} not given, and all are needed{_hint(record)}"
        )
    return {role: sources[role] for role in roles}, ids


def _merged_from(record: Record, output: Path) -> str:
    return f"{output} was merged by method {record.method.name} from {listed(record.sources)}"


def _are(names: list[str]) -> str:
    return f"{listed(names)} {'is' if len(names) == 1 else 'are'}"


def _hint(record: Record) -> str:
    """A hint on how to give models that have no names of their own."""
    named = {role.name for role in record.method.contract.named}
    others = [role for role in record.sources if role not in (record.base, *named)]
    return f"; give the models by {option('models')}, in this order" if others else ""
