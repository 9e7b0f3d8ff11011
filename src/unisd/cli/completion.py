"""`unisd completion`: a script that lets a shell complete commands, options and their values.

What there is to complete is what help shows, so that it needs no list of its own.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from contextlib import redirect_stdout

from unisd import recipes, tasks
from unisd.cli.main import COMMANDS, run_command
from unisd.cli.parser import CommandParser
from unisd.run.resolve import train_parser
from unisd.tasks.graders import GRADERS

BASH = """\
_unisd() {{
  local word=${{COMP_WORDS[COMP_CWORD]}} before=${{COMP_WORDS[COMP_CWORD-1]}} words=
  if [ "$COMP_CWORD" -eq 1 ]; then words="{commands}"
  else
    case "$before" in
{values}
    esac
    case "$word" in -*)
      case "${{COMP_WORDS[1]}}" in
{options}
      esac
    esac
  fi
  COMPREPLY=($(compgen -W "$words" -- "$word"))
}}
complete -o bashdefault -o default -F _unisd unisd
"""
ZSH = "autoload -U +X bashcompinit && bashcompinit\n"


def completion_command(arguments: Sequence[str]) -> int:
    """Print the script of a shell; returns the exit code."""
    parser = CommandParser(
        "completion",
        "Print a script for your shell that completes commands, options and their values. Save it where"
        " the shell looks for it: unisd completion bash > ~/.local/share/bash-completion/completions/unisd",
    )
    parser.add_argument("shell", choices=("bash", "zsh", "fish"), metavar="SHELL", help="bash, zsh or fish")
    options = parser.parse(arguments)
    if options is None:
        return 0
    flags = {name: _flags(name) for name in COMMANDS}
    flags["study"] = [*dict.fromkeys([*flags["study"], *flags["train"]])]  # passed on to its runs
    print(_fish(flags) if options.shell == "fish" else _bash(flags, options.shell), end="")
    return 0


def _flags(command: str) -> list[str]:
    """The options that a command's help shows."""
    page = io.StringIO()
    with redirect_stdout(page):
        run_command(command, ["--help"])
    shown = re.findall(r"^  (?:-h, )?(--\w+)", page.getvalue(), re.M)
    return [*dict.fromkeys([*shown, "--help"])]


def values() -> dict[str, list[str]]:
    """The values of options that have few, by flag."""
    found = {"--recipe": recipes.names(), "--task": tasks.names(), "--grader": [*GRADERS]}
    parser = train_parser()
    for action in parser._actions:
        item = parser.fields.get(action.dest)
        choices = action.choices or (item.metadata["choices"] if item is not None else ())
        if known := [str(one) for one in choices if one is not None]:
            found[f"--{action.dest}"] = known
    return found


def _bash(flags: dict[str, list[str]], shell: str) -> str:
    by_flag = (f'      {flag}) words="{" ".join(known)}" ;;' for flag, known in values().items())
    by_command = (f'      {name}) words="{" ".join(known)}" ;;' for name, known in flags.items())
    text = BASH.format(commands=" ".join(flags), values="\n".join(by_flag), options="\n".join(by_command))
    return ZSH + text if shell == "zsh" else text


def _fish(flags: dict[str, list[str]]) -> str:
    lines = [f'complete -c unisd -n __fish_use_subcommand -f -a "{" ".join(flags)}"']
    known = values()
    for name, of_command in flags.items():
        of_name = f'complete -c unisd -n "__fish_seen_subcommand_from {name}"'
        for flag in of_command:
            given = f' -x -a "{" ".join(known[flag])}"' if flag in known else ""
            lines.append(f"{of_name} -l {flag.removeprefix('--')}{given}")
    return "\n".join(lines) + "\n"
