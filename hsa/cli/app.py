"""The command line: its commands, and how a command line is run."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import typer

from hsa._version import __version__
from hsa.cli import completion, options, usage
from hsa.cli.apply import apply
from hsa.cli.demo import demo
from hsa.cli.eval import eval_
from hsa.cli.inspect import inspect
from hsa.cli.merge import merge
from hsa.cli.mergekit import mergekit
from hsa.cli.methods import methods
from hsa.cli.release import release
from hsa.cli.search import search
from hsa.cli.sweep import sweep
from hsa.cli.verify import verify
from hsa.option_names import command_line, spelled
from hsa.system.console import fail, guarded
from hsa.system.streams import print_stdout

USAGE_ERROR: type[Exception] = typer.BadParameter.__base__  # type: ignore[assignment]
"""click's UsageError: typer brings a click of its own or uses the installed one, depending on its version."""


def run(arguments: Sequence[str]) -> int:
    """Run a command line and return its exit code; see `hsa.system.console.guarded`."""
    debug = "--debug" in arguments

    def work() -> int:
        if completion.VARIABLE in os.environ:
            completion.register_shells()
        try:
            result = program().main(
                list(arguments), prog_name=completion.PROGRAM, complete_var=completion.VARIABLE, standalone_mode=False
            )
        except typer.Exit as error:
            return error.exit_code
        except USAGE_ERROR as error:
            message = error.format_message().removesuffix(".")  # type: ignore[attr-defined]
            stop = "" if message.endswith("?") else "."
            return fail(f"{message}{stop} See: hsa {_command(arguments)}--help", 2, debug=debug)
        except typer.Abort:
            raise KeyboardInterrupt from None
        return result if isinstance(result, int) else 0

    with spelled(command_line):
        return guarded(work, debug=debug)


def _command(arguments: Sequence[str]) -> str:
    """The sub-command with a space after it, for a hint; nothing where there is none."""
    return f"{arguments[0]} " if arguments and arguments[0] in map(_name_of, COMMANDS) else ""


Shell = Annotated[
    str | None,
    typer.Option("--show-completion", metavar="[SHELL]", help="Print the script that completes hsa in a shell."),
]
Installed = Annotated[
    str | None, typer.Option("--install-completion", metavar="[SHELL]", help="Complete hsa in the shell from now on.")
]


def _program(
    ctx: typer.Context,
    version: Annotated[bool, typer.Option("--version", "-V", help="Print the version and exit.")] = False,
    install_completion: Installed = None,
    show_completion: Shell = None,
) -> None:
    if version:
        print_stdout(__version__)
    elif install_completion is not None:
        completion.install(install_completion)
    elif show_completion is not None:
        completion.show(show_completion)
    elif ctx.invoked_subcommand is None:
        print_stdout(ctx.get_help())
        raise typer.Exit(2)
    else:
        return
    raise typer.Exit


def help_(
    ctx: typer.Context, command: Annotated[str | None, typer.Argument(metavar="COMMAND", help="A command.")] = None
) -> None:
    """Show the options of a command, as hsa COMMAND --help does."""
    usage.show_help_of(ctx, command)


COMMANDS: tuple[Callable[..., Any], ...] = (
    merge,
    sweep,
    search,
    apply,
    inspect,
    eval_,
    verify,
    release,
    methods,
    mergekit,
    demo,
)


def _name_of(command: Callable[..., Any]) -> str:
    """A command's name; that of its function ends in `_` where Python has a function of the name."""
    return command.__name__.rstrip("_")


def program() -> Any:
    """The command line, with the options of every method that is known now."""
    app = typer.Typer(
        name=completion.PROGRAM,
        cls=usage.CommandGroup,
        help="Merge fine-tunes of speech models exactly, and find the merge that serves your data.",
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback(invoke_without_command=True)(_program)
    for command in COMMANDS:
        others = {"ignore_unknown_options": True} if command is mergekit else None
        app.command(_name_of(command), cls=usage.Command, context_settings=others)(options.complete(command))
    app.command("help", cls=usage.Command)(help_)
    return typer.main.get_command(app)
