"""`unisd recipes`: the published methods, and what each of them sets."""

from __future__ import annotations

from collections.abc import Sequence

from unisd import recipes

USAGE = (
    "usage: unisd recipes [NAME]\n\nWithout a name, list all recipes. With a name, print its file and"
    " the settings that all recipes share."
)


def recipes_command(arguments: Sequence[str]) -> int:
    """Print the list, or one recipe's file with the shared ones; returns the exit code."""
    if {"-h", "--help"} & set(arguments) or len(arguments) > 1:
        print(USAGE)
        return 0 if len(arguments) <= 1 else 2
    if not arguments:
        width = max(map(len, recipes.names()))
        for name in recipes.names():
            print(f"{name.ljust(width)}  {recipes.load(name).description}")
        return 0
    recipe = recipes.load(arguments[0])
    for file in (*recipe.files, recipes.FOLDER / "_published.yaml", recipes.FOLDER / "_pocket.yaml"):
        print(f"# -- {file}")
        print(file.read_text(encoding="utf-8"))
    return 0
