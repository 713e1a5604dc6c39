"""Parse command lines and lay out help: groups of options, one value for each, plain text of 80 columns."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup, TyperOption

from hsa.actions.keywords import MERGE
from hsa.cli.options import HEADINGS, RAY, with_ray_value
from hsa.errors import shown
from hsa.system.streams import print_stdout

COMMON, *GROUPS = HEADINGS.values()
"""Headings in the help of a command. Each option says under which it stands; common ones say nothing."""

COMPLETION = ("--install-completion", "--show-completion")
"""Options that take the name of a shell, or find it out where none is given."""

NUMBERS = {"NUMBER": "a number", "N": "a whole number"}
"""What the value of an option must be, by the name that help gives it."""

_TYPE = re.compile(r" <[\w\[\]]+>$")
"""What typer adds to the name of an argument."""


class _GroupedHelp:
    """What commands and the group of commands share. Types of click are not named: typer has its own click, or uses
    the installed one, depending on its version."""

    def get_help_option(self, ctx: Any) -> Any:
        help_option = super().get_help_option(ctx)  # type: ignore[misc]
        if help_option is not None:
            help_option.callback = _show_help
        return help_option

    def format_options(self, ctx: Any, formatter: Any) -> None:
        sections: dict[str, list[tuple[str, str]]] = {name: [] for name in ("Arguments", COMMON, *GROUPS)}
        for parameter in self.get_params(ctx):  # type: ignore[attr-defined]
            record = parameter.get_help_record(ctx)
            if record is not None:
                name, description = record
                sections[_group(parameter)].append((_TYPE.sub("", name), description))
        for name, rows in sections.items():
            if rows:
                with formatter.section(name):
                    formatter.write_dl(rows)


def _group(parameter: Any) -> str:
    if parameter.param_type_name == "argument":
        return "Arguments"
    return getattr(parameter, "rich_help_panel", None) or COMMON


class Command(_GroupedHelp, TyperCommand):
    """A command whose help is in groups. It refuses an option which takes one value and is given several: the last
    would win silently."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if any(RAY in parameter.opts for parameter in self.params):
            args = with_ray_value(args)
        values, _, order = self.make_parser(ctx).parse_args(args=list(args))
        for option, count in Counter(item for item in order if isinstance(item, TyperOption)).items():
            if count > 1 and not option.multiple and not option.is_flag:
                ctx.fail(f"{option.opts[0]} is given {count} times and takes one value; give it once")
        try:
            return super().parse_args(ctx, args)
        except typer.BadParameter as error:
            problem = _not_a_number(getattr(error, "param", None), values)
            if problem is not None:
                ctx.fail(problem)
            raise


def _not_a_number(parameter: Any, values: Mapping[str, Any]) -> str | None:
    """What is wrong with the value of a numeric option that could not be read as a number; None for other options.

    typer's own message depends on its version, and lacks the value.
    """
    kind = NUMBERS.get(getattr(parameter, "metavar", None) or "")
    value = None if kind is None else values.get(parameter.name)
    if isinstance(value, list):  # an option that is repeated: the first that is none
        value = next((each for each in value if not _is_number(each)), None)
    if not isinstance(value, str):
        return None
    if value.strip().lstrip("+-").isdecimal():  # it has more digits than Python reads
        kind = "a smaller number"
    problem = f"{parameter.opts[0]} must be {kind}, got {shown(value)}"
    share = _sixty_percent(parameter.name) if value.rstrip().endswith("%") else None
    return problem if share is None else f"{problem}; write {share} for 60 %"


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _sixty_percent(name: str) -> str | None:
    """How 60 % is written for a setting that is a share; None for others."""
    about = next((each.about for each in MERGE.declared_settings() if each.name == name), None)
    return (
        None if about is None or about.low != 0 or not about.axis else {1.0: "0.6", 100.0: "60"}.get(about.high or 0.0)
    )


class CommandGroup(_GroupedHelp, TyperGroup):
    """The commands, each with its whole description; completion takes the name of a shell, or none."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if len(args) == 1 and args[0] in COMPLETION:
            args = [*args, "auto"]
        return super().parse_args(ctx, args)

    def format_options(self, ctx: Any, formatter: Any) -> None:
        super().format_options(ctx, formatter)
        rows = [(name, self.commands[name].help or "") for name in self.list_commands(ctx)]
        with formatter.section("Commands"):
            formatter.write_dl(rows)


def show_help_of(ctx: typer.Context, name: str | None) -> None:
    """Print the help of a command, or of the program. A usage error where there is no such command."""
    parent: Any = ctx.parent
    if name is None:
        print_stdout(parent.get_help())
        return
    _, command, _ = parent.command.resolve_command(parent, [name])
    with command.make_context(name, [], parent=parent, resilient_parsing=True) as command_ctx:
        print_stdout(command_ctx.get_help())


def _show_help(ctx: Any, parameter: Any, value: bool) -> None:
    if value and not ctx.resilient_parsing:
        print_stdout(ctx.get_help())
        ctx.exit()
