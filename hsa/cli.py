"""The command line: which commands there are, and how one ends."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperOption

from hsa._version import __version__
from hsa.commands.apply import apply
from hsa.commands.demo import demo
from hsa.commands.inspect import inspect
from hsa.commands.merge import merge
from hsa.commands.mergekit import mergekit
from hsa.commands.release import release
from hsa.commands.sweep import sweep
from hsa.commands.verify import verify
from hsa.console import fail, guarded
from hsa.option_names import command_line, spelled

USAGE_ERROR: type[Exception] = typer.BadParameter.__base__  # type: ignore[assignment]
"""click's UsageError: typer brings a click of its own or uses the installed one, depending on its version."""


class Command(TyperCommand):
    """A command that refuses an option which takes one value and is given several: the last would win silently."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        _, _, order = self.make_parser(ctx).parse_args(args=list(args))
        for option, count in Counter(each for each in order if isinstance(each, TyperOption)).items():
            if count > 1 and not option.multiple and not option.is_flag:
                ctx.fail(f"{option.opts[0]} is given {count} times and takes one value; give it once")
        return super().parse_args(ctx, args)


app = typer.Typer(
    name="hsa",
    help="Headwise Selective Attention merge for Whisper fine-tunes: streamed, exact, as fast as a copy.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def run(arguments: Sequence[str]) -> int:
    """Run a command line and return its exit code; see `hsa.console.guarded`."""
    debug = "--debug" in arguments

    def work() -> int:
        try:
            result = typer.main.get_command(app).main(list(arguments), prog_name="hsa", standalone_mode=False)
        except typer.Exit as error:
            return error.exit_code
        except USAGE_ERROR as error:
            message = error.format_message()  # type: ignore[attr-defined]
            if not message:  # the bare command: its help is printed already
                return 2
            return fail(f"{message.rstrip('.')}. See: hsa {_command(arguments)}--help", 2, debug=debug)
        except typer.Abort:
            raise KeyboardInterrupt from None
        return result if isinstance(result, int) else 0

    with spelled(command_line):
        return guarded(work, debug=debug)


def _command(arguments: Sequence[str]) -> str:
    """The sub-command with a space after it, for a hint; nothing where there is none."""
    names = [command.callback.__name__ for command in app.registered_commands if command.callback is not None]
    return f"{arguments[0]} " if arguments and arguments[0] in names else ""


@app.callback(invoke_without_command=True)
def _program(version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    if version:
        print(__version__)
        raise typer.Exit


app.command(cls=Command)(merge)
app.command(cls=Command)(sweep)
app.command(cls=Command)(apply)
app.command(cls=Command)(inspect)
app.command(cls=Command)(verify)
app.command(cls=Command)(release)
app.command(cls=Command, context_settings={"ignore_unknown_options": True})(mergekit)
app.command(cls=Command)(demo)
