"""The arguments of calls that merge: the sources, the settings of a method, and the options of the run.

No call lists them itself. Their names come from the contracts and settings of the methods and from `run_options`. From
the same declarations, `signatures` generates what `help` and editors show.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from functools import cache
from typing import Any, Literal, NoReturn

from hsa.actions.run_options import RunOptions
from hsa.actions.source_arguments import (
    as_several,
    id_names,
    missing_sources,
    refuse_missing_base,
    several_names,
    source_names,
    take_sources,
)
from hsa.arguments import check_paths, check_values
from hsa.errors import RequestError, listed, shown
from hsa.methods.all_settings import all_settings
from hsa.methods.base import BASE, Contract
from hsa.methods.registry import method_named
from hsa.methods.settings import DEFAULT_METHOD, Declared, SettingInfo, Settings, declared
from hsa.option_names import option
from hsa.sources.roles import Role
from hsa.system.types import PathLike

EVERY = frozenset(each.name for each in declared(RunOptions))
"""The names of all options of a run."""

CONFIG_FILE = "config"
"""The argument that takes a mergekit file."""


@dataclass(frozen=True)
class Call:
    """The arguments that a call takes.

    Args:
        name: the function's name, for messages.
        sources: `positional` for a call that merges and so needs sources and an output; `named` for a call that takes
            sources by name and also works without them.
        ids: whether it takes ids to record for the sources.
        settings: which settings of methods it takes. `patchable` are those whose every value a patch can represent,
            `candidates` those of them that do not change the plan of a merge, `planned` all others.
        output: whether it writes an output, if it merges.
        config: whether it also takes a mergekit file in place of sources, method and settings.
        grid: whether settings that are axes take lists of values.
        method: whether it takes the name of a method for `named` sources.
        options: the names of the options of a run that it takes.
        helps: its own help texts of options, by name.
    """

    name: str
    sources: Literal["positional", "named", "none"] = "positional"
    ids: bool = True
    settings: Literal["all", "patchable", "candidates", "planned", "none"] = "all"
    output: bool = True
    config: bool = False
    grid: bool = False
    method: bool = False
    options: frozenset[str] = EVERY
    helps: Mapping[str, str] = field(default_factory=dict)

    def declared_settings(self) -> tuple[Declared, ...]:
        """The settings of all methods that the call takes, each name once, those of the default method first."""
        return tuple(all_settings(self._takes).values())

    def settings_of(self, owner: type[Settings]) -> tuple[Declared, ...]:
        """The settings of a method that the call takes."""
        return tuple(each for each in declared(owner) if self._takes(each.about))

    def _takes(self, about: SettingInfo) -> bool:
        takes: dict[str, bool] = {
            "all": True,
            "patchable": about.patchable,
            "candidates": about.patchable and not about.structural,
            "planned": about.structural or not about.patchable,
            "none": False,
        }
        return takes[self.settings]

    def declared_options(self) -> tuple[Declared, ...]:
        """The options of a run that the call takes, with the call's own help texts."""
        return tuple(self._told(each) for each in declared(RunOptions) if each.name in self.options)

    def _told(self, each: Declared) -> Declared:
        text = self.helps.get(each.name)
        return each if text is None else replace(each, about=replace(each.about, help=text, python=None))

    def names(self) -> tuple[str, ...]:
        """The names of all arguments, except those that the function declares itself."""
        method = ("method",) if self.method or self.sources == "positional" else ()
        sources = {
            "positional": (*positional_names(self), *method, "models"),
            "named": (*source_names(), *method, "models"),
        }
        ids = (*id_names(), "model_ids") if self.ids and self.sources != "none" else ()
        declarations = (*self.declared_settings(), *self.declared_options())
        config = (CONFIG_FILE,) if self.config else ()
        return (*sources.get(self.sources, ()), *config, *ids, *(each.name for each in declarations))


MERGE = Call("merge", config=True)
MERGER = Call(
    "Merger",
    ids=False,
    settings="planned",
    output=False,
    options=frozenset({"backend", "device", "threads"}),
)
MERGE_PATCH = Call("merge_patch", settings="patchable", options=EVERY - {"digest"})
SWEEP = Call(
    "sweep",
    settings="patchable",
    grid=True,
    options=EVERY - {"backend", "device"},
    helps={"overwrite": "Replace points that were made with other settings or versions."},
)
APPLY = Call("apply", sources="none", settings="none", options=frozenset({"threads", "digest", "sync", "overwrite"}))
INSPECT = Call(
    "inspect",
    sources="named",
    ids=False,
    settings="patchable",
    method=True,
    options=frozenset({"threads"}),
    helps={"threads": "Worker threads, for methods that merge whole models."},
)
VERIFY = Call("verify", sources="named", settings="none", options=frozenset({"threads"}))
RELEASE = Call(
    "release",
    sources="none",
    settings="none",
    options=frozenset({"backend", "device", "threads", "sync", "overwrite", "strict"}),
    helps={"overwrite": "Rebuild what differs from the recipe or is damaged."},
)


@dataclass(frozen=True)
class Arguments:
    """The arguments of a call, by kind.

    `settings` and `options` hold only what was given; `output` is None for a call that declares that argument itself.
    """

    method: str
    sources: Mapping[Role, PathLike]
    ids: Mapping[Role, str | None]
    output: Any
    settings: Mapping[str, Any]
    options: Mapping[str, Any]


@dataclass(frozen=True)
class NamedArguments:
    """The arguments of a call that also works without sources. Sources and ids are kept by argument name, because their
    roles are only known later. Arguments that are None are left out."""

    sources: Mapping[str, Any]
    ids: Mapping[str, Any]
    settings: Mapping[str, Any]
    options: Mapping[str, Any]

    def check_types(self) -> None:
        """Raise RequestError unless the sources are paths, and `models` and `model_ids` are lists."""
        models = self.sources.get("models", ())
        check_values(models=models)
        check_values(model_ids=self.ids.get("model_ids", ()))
        check_paths(**{f"model{number}": path for number, path in enumerate(models, 1)})
        for name, source in self.sources.items():
            if name != "models":
                for path in as_several(name, source) if name in several_names() else [source]:
                    check_paths(**{name: path})

    def by_roles(self, contract: Contract) -> tuple[dict[Role, PathLike], dict[Role, str | None], list[str]]:
        """The sources and the ids by the roles of a method, and the names of arguments that belong to none of its
        sources."""
        left = {**self.sources, **self.ids}
        sources, ids = take_sources(contract, left)
        return sources, ids, list(left)


def split(call: Call, positional: Sequence[Any], keywords: Mapping[str, Any]) -> Arguments:
    """Split the arguments of a merging call by kind.

    Raises TypeError, as Python does, for an argument that is missing or that no method takes. Raises RequestError if
    the method does not take the sources or a setting.

    Example:
        >>> split(MERGE, ("b", "m1", "m2", "merged"), {"k": 0.5}).settings
        {'k': 0.5}
    """
    given = dict(_bind(call, positional, keywords))
    _check_names(call, given)
    name = given.pop("method", DEFAULT_METHOD)
    method = method_named(name)
    settings, options = _take_settings(call, name, given), _take_options(call, given)
    if call.output and "output" not in given:
        raise TypeError(f"{call.name}() missing required argument: 'output'")
    output = given.pop("output", None)
    missing = missing_sources(method.contract, given)
    refuse_missing_base(method.name, missing)
    _refuse_missing(call, missing)
    sources, ids = take_sources(method.contract, given)
    method.contract.check(name, base=BASE in sources, models=len(sources) - (BASE in sources))
    for left in given:
        if left not in call.names():
            _refuse_unknown(call, left)
        known = [*([] if method.contract.base == "none" else [BASE]), *(role.name for role in method.contract.named)]
        raise RequestError(
            f"method {name} has no {option(left)}; give its sources by {' and '.join(map(option, [*known, 'models']))}"
        )
    if "assets_from" in call.options:
        options.setdefault("assets_from", next(role for role in sources if role != BASE))
    return Arguments(name, sources, ids, output, settings, options)


def check_keywords(call: Call, keywords: Collection[str]) -> None:
    """Raise TypeError for the first keyword that the call does not take with any method."""
    _check_names(call, keywords)


def split_named(call: Call, keywords: Mapping[str, Any], method: str = DEFAULT_METHOD) -> NamedArguments:
    """Split, by kind, the arguments of a call that also works without sources; the settings are those of `method`."""
    given = {name: value for name, value in keywords.items() if not (call.method and name == "method")}
    _check_names(call, given)
    settings, options = _take_settings(call, method, _without_none(given)), _take_options(call, given)
    for each in call.declared_settings():
        given.pop(each.name, None)
    names = (*source_names(), "models")
    sources = {name: given.pop(name) for name in names if name in given}
    return NamedArguments(_without_none(sources), _without_none(given), settings, options)


def _without_none(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def run_options(call: Call, keywords: Mapping[str, Any]) -> RunOptions:
    """The options of a call that takes no other keywords. Raises TypeError for others."""
    _check_names(call, keywords)
    return RunOptions(**keywords)


def candidate(name: str, options: Collection[str] = ()) -> Call:
    """A call that merges, with other settings, what is already in memory."""
    return Call(name, sources="none", ids=False, settings="candidates", options=frozenset(options))


def axes(call: Call, owner: type[Settings]) -> tuple[str, ...]:
    """The settings of a method that a candidate's call takes by position: the axes of a sweep."""
    return tuple(each.name for each in call.settings_of(owner) if each.about.axis)


def candidate_settings(
    call: Call, owner: type[Settings], positional: Sequence[Any], keywords: Mapping[str, Any]
) -> dict[str, Any]:
    """All settings of a candidate by name, with defaults for those that are not given.

    Raises TypeError for arguments that no method takes, and RequestError for settings of another method.
    """
    hashable: Any = owner
    defaults, names = _candidates(hashable)
    if positional:
        keywords = {**_by_position(call, names, positional, keywords), **keywords}
    if not keywords.keys() <= defaults.keys():
        _check_names(call, keywords)
        _take_settings(call, owner.method, dict(keywords))
    return {name: keywords.get(name, default) for name, default in defaults.items()}


@cache
def _candidates(owner: Any) -> tuple[Mapping[str, Any], tuple[str, ...]]:
    """The settings in which candidates may differ, with their defaults, and the names of those that may be positional.

    The result is cached, so that a candidate starts quickly.
    """
    call = candidate("")
    return {each.name: each.default for each in call.settings_of(owner)}, axes(call, owner)


def _by_position(
    call: Call, names: Sequence[str], positional: Sequence[Any], keywords: Collection[str]
) -> dict[str, Any]:
    """Positional arguments by their names. Raises TypeError for too many, and for one that is given twice."""
    if len(positional) > len(names):
        raise TypeError(f"{call.name}() takes at most {len(names)} positional arguments, {len(positional)} were given")
    given = dict(zip(names, positional, strict=False))
    twice = next((name for name in given if name in keywords), None)
    if twice is not None:
        raise TypeError(f"{call.name}() got multiple values for argument '{twice}'")
    return given


def _take_settings(call: Call, method: str, given: dict[str, Any]) -> dict[str, Any]:
    """Remove the settings of a method from the arguments and return them. RequestError for one of another method."""
    own = call.settings_of(method_named(method).Settings)
    settings = {each.name: given.pop(each.name) for each in own if each.name in given}
    foreign = next((each.name for each in call.declared_settings() if each.name in given), None)
    if foreign is not None:
        if call.settings == "candidates" and foreign in {each.name for each in declared(method_named(method).Settings)}:
            raise RequestError(
                f"{option(foreign)} of method {method} is the same for all candidates; give it when you make the Merger"
            )
        names = ", ".join(option(each.name, False if each.default is True else None).split("=")[0] for each in own)
        raise RequestError(f"method {method} has no {option(foreign)}; its settings are {names}")
    return settings


def _take_options(call: Call, given: dict[str, Any]) -> dict[str, Any]:
    return {each.name: given.pop(each.name) for each in call.declared_options() if each.name in given}


def _bind(call: Call, positional: Sequence[Any], keywords: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """All arguments by name."""
    yield from _by_position(call, positional_names(call), positional, keywords).items()
    yield from keywords.items()


def positional_names(call: Call) -> tuple[str, ...]:
    """The arguments of a call that may be positional: the sources of the default method, and the output."""
    return (*source_names(), "output") if call.output else source_names()


def _refuse_missing(call: Call, names: Sequence[str]) -> None:
    if names:
        raise TypeError(f"{call.name}() missing required argument{'s' * (len(names) > 1)}: {listed(map(shown, names))}")


def _check_names(call: Call, given: Collection[str]) -> None:
    """Raise TypeError for the first argument that the call does not take with any method."""
    for name in given:
        of_a_model = call.ids and name.startswith("model") and name.endswith("_id")  # its role depends on the method
        if name not in call.names() and not of_a_model:
            _refuse_unknown(call, name)


def _refuse_unknown(call: Call, name: str) -> NoReturn:
    near = get_close_matches(name, sorted(call.names()), n=3)
    hint = f". Did you mean {' or '.join(map(shown, near))}?" if near else ""
    raise TypeError(f"{call.name}() got an unexpected keyword argument {shown(name)}{hint}")
