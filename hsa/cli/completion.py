"""Complete command lines in the shell: `hsa --install-completion` and `--show-completion`."""

from __future__ import annotations

from hsa.errors import RequestError, shown
from hsa.system.streams import print_stdout

PROGRAM = "hsa"
VARIABLE = "_HSA_COMPLETE"
"""The environment variable by which a shell asks for completions."""

SHELLS = ("bash", "zsh", "fish", "powershell", "pwsh")


def show(shell: str) -> None:
    """Print the script that a shell reads. `auto` is the shell that started this process."""
    from typer._completion_shared import get_completion_script

    print_stdout(get_completion_script(prog_name=PROGRAM, complete_var=VARIABLE, shell=_shell_name(shell)))


def install(shell: str) -> None:
    """Write the script where the shell finds it, and say where."""
    from typer._completion_shared import install

    name, path = install(shell=_shell_name(shell), prog_name=PROGRAM, complete_var=VARIABLE)
    print_stdout(f"{path} completes hsa in {name}; start a new shell to use it")


def register_shells() -> None:
    """Let typer answer the shell, which asks by an environment variable."""
    from typer._completion_classes import completion_init

    completion_init()


def _shell_name(shell: str) -> str:
    if shell == "auto":
        import shellingham

        try:
            shell = shellingham.detect_shell()[0]
        except shellingham.ShellDetectionFailure:
            raise RequestError(f"the shell is not known; name it, one of {', '.join(SHELLS)}") from None
    if shell not in SHELLS:
        raise RequestError(f"there is no completion for the shell {shown(shell, 40)}; there is for {', '.join(SHELLS)}")
    return shell
