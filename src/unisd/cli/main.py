"""`unisd`: parse, call, print.

Heavy imports happen inside the commands, so that `unisd --help` answers at once.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Sequence

from unisd import __version__
from unisd.errors import UserError

OVERVIEW = """\
unisd: adapt a causal language model to your task by self-distillation (UniSD, arXiv 2605.06597).

  unisd train            run a complete adaptation of the embedded pocket model (about 3 minutes on 2 cores)
  unisd train --help     every option, grouped by mechanism
  unisd probe            before training: is the teacher worth learning from?
  unisd prepare          build and inspect auxiliary contexts and wrong references
  unisd eval             accuracy on tasks, retention and perplexities of a saved model
  unisd grade TASK       grade completions that any system wrote
  unisd study            which mechanisms matter for a task: a design of runs, effects with intervals
  unisd report DIR       a run or a study as one HTML page
  unisd recipes [NAME]   published methods as files
  unisd merge DIR        an adapter into a full model
  unisd chat DIR         try a model, side by side with its base
  unisd --version
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, 2 for a user's mistake, 130 after Ctrl-C or
    SIGTERM.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    # Imported along with peft, on a CPU with bfloat16 it tells of kernels from a hub that it could
    # not load.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        return _dispatch(arguments)
    except UserError as error:
        print(f"unisd: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("unisd: interrupted.", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `unisd recipes | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        from unisd.training.checkpoints import disk_is_full

        if not disk_is_full(error):
            raise
        print(
            "unisd: error: the disk is full: free some space, then resume from the last checkpoint.",
            file=sys.stderr,
        )
        return 2


def _dispatch(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(OVERVIEW, end="")
        return 0
    if arguments[0] in ("--version", "-V"):
        print(f"unisd {__version__}")
        return 0
    name, rest = arguments[0], arguments[1:]
    if name not in COMMANDS:
        import difflib

        close = difflib.get_close_matches(name, COMMANDS, n=1, cutoff=0.5)
        hint = f"did you mean {close[0]!r}?" if close else f"there are: {', '.join(COMMANDS)}."
        raise UserError(f"unknown command {name!r}: {hint}")
    if os.name != "posix":
        raise UserError("unisd runs on POSIX systems only: on Windows, use WSL.")
    return COMMANDS[name](rest)


def _train(arguments: list[str]) -> int:
    from unisd.cli.help import help_text
    from unisd.cli.parsing import parse, train_parser
    from unisd.console import quiet_libraries
    from unisd.run import launch
    from unisd.run import train as run

    if {"-h", "--help", "--help_all", "--help-all"} & set(arguments):
        print(
            help_text(train_parser(), everything=bool({"--help_all", "--help-all"} & set(arguments))), end=""
        )
        return 0
    quiet_libraries()
    options, config = parse(arguments)
    if options.accelerate_config is not None and not options.dry_run and not launch.is_launched():
        return launch.launch(options, str(config.output_dir))
    if options.dry_run:
        from unisd.cli.train import dry_run

        dry_run(options, config)
        return 0
    ended = run.train(options, config) is not None
    launch.leave()
    return 0 if ended else 130


def _probe(arguments: list[str]) -> int:
    from unisd.cli import probe as probing
    from unisd.console import quiet_libraries

    quiet_libraries()
    return probing.probe_command(arguments)


def _prepare(arguments: list[str]) -> int:
    from unisd.cli import prepare as preparing

    return preparing.prepare_command(arguments)


def _study(arguments: list[str]) -> int:
    from unisd.cli import study as command

    return command.study_command(arguments)


def _report(arguments: list[str]) -> int:
    from unisd.cli import report as command

    return command.report_command(arguments)


def _recipes(arguments: list[str]) -> int:
    from unisd import recipes

    if {"-h", "--help"} & set(arguments) or len(arguments) > 1:
        print(
            "usage: unisd recipes [NAME]\n\nWithout a name the list, with one its file and what all recipes"
            " share."
        )
        return 0 if len(arguments) <= 1 else 2
    if not arguments:
        width = max(map(len, recipes.names()))
        for name in recipes.names():
            print(f"{name.ljust(width)}  {recipes.load(name).description}")
        return 0
    recipe = recipes.load(arguments[0])
    for file in (recipe.file, recipes.FOLDER / "_published.yaml", recipes.FOLDER / "_pocket.yaml"):
        print(f"# -- {file}")
        print(file.read_text(encoding="utf-8"))
    return 0


def _evaluate(arguments: list[str]) -> int:
    from unisd.cli import evaluate as evaluating

    return evaluating.evaluate(arguments)


def _grade(arguments: list[str]) -> int:
    from unisd.cli import evaluate as evaluating

    return evaluating.grade(arguments)


def _merge(arguments: list[str]) -> int:
    from unisd.cli import merge as commands

    return commands.merge(arguments)


def _chat(arguments: list[str]) -> int:
    from unisd.cli import chat as commands

    return commands.chat(arguments)


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "train": _train,
    "probe": _probe,
    "prepare": _prepare,
    "eval": _evaluate,
    "grade": _grade,
    "study": _study,
    "report": _report,
    "recipes": _recipes,
    "merge": _merge,
    "chat": _chat,
}

if __name__ == "__main__":
    sys.exit(main())
