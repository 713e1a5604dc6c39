"""Options of the commands. Those of sources, settings and runs are made from their declarations; those that several
commands share besides stand here once."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, TypeVar, get_args, get_origin, get_type_hints

import typer

from hsa.actions.keywords import CONFIG_FILE, Call
from hsa.actions.run_options import RunOptions
from hsa.actions.signatures import BASE_HELP, with_roles
from hsa.actions.source_arguments import missing_sources, refuse_missing_base, several_names, source_names
from hsa.errors import shown
from hsa.methods.all_settings import all_settings
from hsa.methods.base import BASE
from hsa.methods.registry import method_named, methods
from hsa.methods.settings import DEFAULT_METHOD, Declared, Group, declared
from hsa.option_names import command_line

HEADINGS: Mapping[Group, str] = {
    "common": "Common options",
    "sources": "Sources",
    "numerics": "Numerics",
    "output": "Output",
    "machine": "Machine",
}
"""What stands over the options of a group in help."""

SOURCES, OUTPUT, MACHINE = HEADINGS["sources"], HEADINGS["output"], HEADINGS["machine"]

DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the plan, write nothing.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object to stdout.", rich_help_panel=OUTPUT)]
Quiet = Annotated[bool, typer.Option("--quiet", help="Print warnings and errors alone.", rich_help_panel=OUTPUT)]
Debug = Annotated[bool, typer.Option("--debug", help="Add the traceback to an error.", rich_help_panel=MACHINE)]

RAY = "--ray"
Ray = Annotated[
    str | None,
    typer.Option(
        RAY,
        metavar="[ADDRESS]",
        help="Run on a cluster of Ray: that at HOST:PORT, or one that runs; else on this machine.",
        rich_help_panel=MACHINE,
    ),
]
"""An option whose value may be left out; `ray_address` reads what a command gets for it."""

_RAY_VALUE = re.compile(r"ray://\S+|auto|local|[^\s/=-][^\s/=]*:[0-9]+")
"""What the word after `--ray` must look like to be its value: any other is a word of its own."""

F = TypeVar("F", bound=Callable[..., Any])
Parameters = Callable[[], Sequence[inspect.Parameter]]

_MAKERS = "_hsa_declared"

EACH_MODEL = " Repeat it to give each model its own."
"""What help says of a setting that is a number for all models, or one for each."""

MOST_NAMED = 3
"""Methods that help names beside a setting; of more it says how many have it."""


def declares(before: Parameters | None = None, after: Parameters | None = None) -> Callable[[F], F]:
    """Give a command options that are made from declarations when the command line is built, before and after those
    that it requires itself. They arrive in its `**values`, which `given` takes."""

    def decorate(function: F) -> F:
        setattr(function, _MAKERS, (before, after))
        return function

    return decorate


def complete(function: F) -> F:
    """A command with its signature: all its options, its own and those that are declared."""
    if not hasattr(function, _MAKERS):
        return function
    before, after = ([] if make is None else list(make()) for make in getattr(function, _MAKERS))
    hints = get_type_hints(function, include_extras=True)
    own = [
        each.replace(annotation=hints[each.name], kind=inspect.Parameter.KEYWORD_ONLY)
        for each in inspect.signature(function, follow_wrapped=False).parameters.values()
        if each.kind is not inspect.Parameter.VAR_KEYWORD
    ]
    required = [each for each in own if each.default is inspect.Parameter.empty]
    parameters = [*before, *required, *after, *(each for each in own if each not in required)]

    def command(**values: Any) -> Any:
        return function(**values)

    command.__name__, command.__doc__ = function.__name__, function.__doc__
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {each.name: each.annotation for each in parameters}
    return command  # type: ignore[return-value]


def with_ray_value(words: Sequence[str]) -> list[str]:
    """The words of a command line, with an empty value for a `--ray` that no address follows. typer has no option whose
    value may be left out.

    Example:
        >>> with_ray_value(["--ray", "--json"]), with_ray_value(["--ray", "head:6379"])
        (['--ray=', '--json'], ['--ray', 'head:6379'])
    """
    end = words.index("--") if "--" in words else len(words)
    return [
        f"{RAY}="
        if word == RAY and place < end and not _RAY_VALUE.fullmatch("".join(words[place + 1 : min(place + 2, end)]))
        else word
        for place, word in enumerate(words)
    ]


def ray_address(value: str | None) -> bool | str:
    """The argument `ray` of Python's calls for the value of `--ray`: False where the option is not given, True where it
    has no address."""
    return False if value is None else value or True


def given(ctx: typer.Context, values: Mapping[str, Any]) -> dict[str, Any]:
    """The values of declared options that the command line gives, as Python's keywords."""
    negated = {each.name for each in declared(RunOptions) if each.default is True}
    alike = {name for name, each in all_settings(lambda about: about.per_model).items() if not each.about.repeated}
    named = {name: value for name, value in values.items() if not _is_default(ctx, name)}

    def plain(name: str, value: Any) -> Any:
        one_for_all = name in alike and isinstance(value, list) and len(value) == 1
        return not value if name in negated else value[0] if one_for_all else value

    return {name: plain(name, value) for name, value in named.items()}


def given_merge(ctx: typer.Context, values: Mapping[str, Any], call: Call) -> dict[str, Any]:
    """The same for a command that merges. A usage error where a source that the method needs is missing."""
    keywords = given(ctx, values)
    if not (call.config and CONFIG_FILE in keywords):
        method = method_named(keywords.get("method", DEFAULT_METHOD))
        missing = missing_sources(method.contract, keywords)
        refuse_missing_base(method.name, missing)
        for role in missing:
            ctx.fail(f"Missing option {shown(command_line(role))}.")
    if "card" in keywords:
        from hsa.outputs.card import parse_fields

        keywords["card"] = parse_fields(keywords["card"])
    return keywords


def source_paths(keywords: Mapping[str, Any]) -> list[str]:
    """The sources among the keywords."""
    paths: list[str] = []
    for name in (*source_names(), "models"):
        given_by = keywords.get(name, ())
        paths += [given_by] if isinstance(given_by, str) else given_by
    return paths


def _is_default(ctx: typer.Context, name: str) -> bool:
    source = ctx.get_parameter_source(name)
    return source is None or source.name == "DEFAULT"


# What is declared -----------------------------------------------------------------------------------------------------


def option(
    name: str, kind: Any, help: str, default: Any = None, *, group: Group = "common", off: bool = False, **about: Any
) -> inspect.Parameter:
    """An option of a command by its name in Python; `off`: it is a flag that switches off."""
    panel = None if group == "common" else HEADINGS[group]
    info: Any = typer.Option(command_line(name, False if off else None), help=help, rich_help_panel=panel, **about)
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, info])


def sources(help: str | None = None) -> Iterator[inspect.Parameter]:
    """Base and the models, by the roles of the default method and in their order; `help` is for all but the latter."""
    named = method_named(DEFAULT_METHOD).contract.named
    yield option(BASE, str | None, help or BASE_HELP, metavar="SOURCE")
    for role in named:
        text = f"{role.help[:-1]}; repeat for more." if role.several else role.help
        yield option(role.name, list[str] | None if role.several else str | None, help or text, metavar="SOURCE")
    others = " and ".join(command_line(role.name) for role in named)
    yield option("models", list[str] | None, f"A model, instead of {others}; repeat.", metavar="SOURCE")


def method(*, given: bool = True) -> inspect.Parameter:
    """How to merge; where it need not be `given`, an output may say it."""
    text = f"How to merge: {', '.join(methods())}."
    if given:
        return option("method", str, text, DEFAULT_METHOD, metavar="NAME")
    return option("method", str | None, text, metavar="NAME", show_default=f"the output's, else {DEFAULT_METHOD}")


def config() -> inspect.Parameter:
    """A file of mergekit's in the place of sources, method and settings."""
    text = "mergekit's YAML, which says models, method and settings."
    return option(CONFIG_FILE, str | None, text, metavar="FILE")


def ids(help: str | None = None) -> Iterator[inspect.Parameter]:
    """Ids to record for the sources."""
    for role in source_names():
        several = role in several_names()
        text = help or f"Hub id to record for {role}{'; repeat for more' * several}."
        yield option(f"{role}_id", list[str] | None if several else str | None, text, group="sources", metavar="ID")
    text = help or f"Hub id to record for a {command_line('models')}; repeat."
    yield option("model_ids", list[str] | None, text, group="sources", metavar="ID")


def settings(call: Call, said: Callable[[Declared, str], str] | None = None) -> Iterator[inspect.Parameter]:
    """The settings that a call takes, of all methods; where not all have one, its help says which do.

    `said` tells help what takes the place of a default, by the setting and the text of that: none is given then.
    """
    for each in call.declared_settings():
        owned = {
            name: own
            for name, other in methods().items()
            for own in call.settings_of(other.Settings)
            if own.name == each.name
        }
        by_model = any(own.about.per_model for own in owned.values())
        told = replace(
            each,
            about=replace(
                each.about,
                help=_help_of(owned) + (EACH_MODEL if by_model and not each.about.repeated else ""),
                default_text=_default_of(owned),
                per_model=by_model,
            ),
        )
        if said is not None and not isinstance(each.default, bool):
            yield _option_of(told, default=None, show_default=_shown_default(told, said))
        elif call.grid and each.about.axis:
            yield _grid_option(told)
        elif isinstance(each.default, bool):
            yield _switch(told)
        else:
            yield _option_of(told, **_defaults_of(told))


def _defaults_of(each: Declared) -> dict[str, Any]:
    """The default of a setting's option and what help shows of it. An option that is a list has
    none, so that help shows no single number for it."""
    text = each.about.default_text
    if each.about.per_model and not isinstance(each.default, (tuple, type(None))):
        return {"default": None, "show_default": text or str(each.default)}
    return {"show_default": text or True}


def _shown_default(each: Declared, said: Callable[[Declared, str], str]) -> str | bool:
    if each.about.silent or each.about.required or (each.default is None and each.about.default_text is None):
        return False
    return said(each, each.about.default_text or str(each.default))


def _help_of(owned: Mapping[str, Declared]) -> str:
    """What help says of a setting that some methods have: of whom, and every text that they have for it."""
    by_text: dict[str, list[str]] = {}
    for name, each in owned.items():
        by_text.setdefault(each.about.help, []).append(name)
    if len(by_text) == 1 and len(owned) == len(methods()):
        return next(iter(by_text))
    parts = []
    for text, names in sorted(by_text.items(), key=lambda item: DEFAULT_METHOD not in item[1]):
        parts.append(f"{', '.join(names) if len(names) <= MOST_NAMED else f'{len(names)} methods'}: {text}")
    return " ".join(parts)


def _default_of(owned: Mapping[str, Declared]) -> str | None:
    """What help shows as the default where that is not each method's own."""
    texts = {each.about.default_text for each in owned.values()}
    defaults = [each.default for each in owned.values()]
    return next(iter(texts)) if defaults.count(defaults[0]) == len(defaults) else "the method's"


def run(taken: Collection[Declared]) -> Iterator[inspect.Parameter]:
    """Options of a run."""
    for each in taken:
        yield _option_of(each)


def _option_of(each: Declared, **about: Any) -> inspect.Parameter:
    """The option of a declaration. What is on by default has a flag that switches it off."""
    kind, metavar = _kind(each)
    default = about.pop("default", False if kind is bool else each.default)
    if each.about.default_text is not None and "show_default" not in about:
        about["show_default"] = each.about.default_text
    return option(
        each.name,
        kind if default is not None else kind | None,
        with_roles(each.about.help),
        default,
        group=each.about.group,
        off=each.default is True,
        metavar=None if kind is bool else each.about.metavar or metavar,
        **about,
    )


def _switch(each: Declared) -> inspect.Parameter:
    """A setting that is on or off, and whose default is the method's: a flag for either."""
    name = command_line(each.name)
    info: Any = typer.Option(
        f"{name}/{command_line(each.name, False)}",
        help=with_roles(each.about.help),
        rich_help_panel=None if each.about.group == "common" else HEADINGS[each.about.group],
        show_default=each.about.default_text or ("on" if each.default else "off"),
    )
    kind = inspect.Parameter.KEYWORD_ONLY
    return inspect.Parameter(each.name, kind, default=None, annotation=Annotated[bool | None, info])


def _kind(each: Declared) -> tuple[Any, str]:
    """The type of an option's values, and what help calls them."""
    if each.about.per_model:
        return list[float], "NUMBER"
    if each.about.repeated:
        return list[str], "TEXT"
    if each.about.choices:
        return str, "NAME"
    if isinstance(each.default, bool):
        return bool, ""
    if each.about.whole:
        return int, "N"
    if each.about.low is not None:
        return float, "NUMBER"
    repeated = any(get_origin(part) is Mapping for part in get_args(each.type))
    return (list[str], "FIELD=VALUE") if repeated else (str, "VALUE")


def _grid_option(each: Declared) -> inspect.Parameter:
    """The option of an axis, which takes several values."""
    text = each.about.help.rstrip(".")
    if each.about.choices:
        metavar, text = f"{each.about.metavar or 'NAME'}S", f"{text}; several with commas."
    else:
        metavar, text = "VALUES", f"{text}; such as 0.2,0.6 or 0:1:0.1."
    return option(each.name, str, text, str(each.default), group=each.about.group, metavar=metavar)
