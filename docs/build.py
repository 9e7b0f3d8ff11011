"""Builds the documentation site, `site/index.html`: `pip install -e ".[docs]"` comes before.

Pages are copied to `build/docs`, as zensical has no hooks. On the way a line such as
`<!-- site:options -->` becomes what is made from the code, and a link out of `docs/` leads to a
page with that file, so that the site needs nothing beside itself. Neither torch nor transformers is
imported: the option table, the recipes and the help of the commands are light, and docstrings are
read from the source.
"""

from __future__ import annotations

import ast
import io
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from dataclasses import MISSING, Field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
DOCS, PAGES = ROOT / "docs", ROOT / "build/docs"
COPIED = {".md", ".png", ".svg", ".js", ".css", ".ipynb"}
MARKER = re.compile(r"^<!-- site:(\w+) ?(.*?) -->$", re.M)
LINK = re.compile(r"(\]\()([^)#\s]+)([^)]*\))")
FENCED = re.compile(r"(^ *```.*?^ *```$)", re.M | re.S)
ARXIV = re.compile(r"\b(2[0-9]{3}\.[0-9]{5})\b")
PAGE_OF = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}


def build() -> int:
    """Write the pages, then the site; returns zensical's exit code."""
    sys.path.insert(0, str(ROOT / "src"))
    shutil.rmtree(PAGES, ignore_errors=True)
    linked: dict[str, Path] = {}  # pages of files outside of docs/, by their place
    for file in sorted(path for path in DOCS.rglob("*") if path.suffix in COPIED):
        place = file.relative_to(DOCS).as_posix()
        if file.suffix == ".md":
            write(place, page(file.read_text(encoding="utf-8"), file, place, linked))
        else:
            (PAGES / place).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, PAGES / place)
    while missing := [place for place in linked if not (PAGES / place).exists()]:
        for place in missing:
            write(place, page(source_page(linked[place]), linked[place], place, linked))
    command = [sys.executable, "-m", "zensical", "build", "--strict", "--clean"]
    return subprocess.run(command, cwd=ROOT, check=False).returncode


def write(place: str, text: str) -> None:
    (PAGES / place).parent.mkdir(parents=True, exist_ok=True)
    (PAGES / place).write_text(text, encoding="utf-8")


def page(text: str, origin: Path, place: str, linked: dict[str, Path]) -> str:
    """A page of the site: links follow it to its place, markers are filled in.

    Args:
        origin: the file in whose folder links begin.
        place: the page's path below the site's root.
        linked: pages to write for files outside of docs/; more are added.
    """
    parts = FENCED.split(text)
    parts[::2] = [LINK.sub(lambda found: follow(found, origin, place, linked), part) for part in parts[::2]]

    def filled(found: re.Match[str]) -> str:
        name, what = found.groups()
        if name == "file":  # links of another file begin elsewhere
            return page((ROOT / what).read_text(encoding="utf-8"), ROOT / what, place, linked)
        if name == "section":
            file, _, heading = what.partition(" ")
            return page(section(ROOT / file, heading), ROOT / file, place, linked)
        return MADE[name](what)

    return MARKER.sub(filled, "".join(parts))


def follow(found: re.Match[str], origin: Path, place: str, linked: dict[str, Path]) -> str:
    """A link as it is on the site; one that leads nowhere stays, and fails the build."""
    begin, link, end = found.groups()
    target = Path(os.path.normpath(origin.parent / link))
    if re.match(r"\w+:", link) or not target.is_file():
        return found[0]
    name = target.relative_to(ROOT).as_posix()
    if target.is_relative_to(DOCS) and target.suffix in COPIED:
        there = target.relative_to(DOCS).as_posix()
    elif name in PAGE_OF:
        there = PAGE_OF[name]
    else:
        there = f"source/{name}" if target.suffix == ".md" else f"source/{name}.md"
        linked[there] = target
    return begin + os.path.relpath(there, Path(place).parent) + end


def source_page(file: Path) -> str:
    """A file of the repository as a page."""
    if file.suffix == ".md":
        return file.read_text(encoding="utf-8")
    return f"# {file.name}\n\nThe file `{file.relative_to(ROOT)}`.\n\n{code(str(file.relative_to(ROOT)))}\n"


def section(file: Path, heading: str) -> str:
    """What stands below a heading of the second level.

    Raises:
        SystemExit: there is none; the file has been changed without its page.
    """
    found = re.search(rf"^## {re.escape(heading)}\n(.*?)(?=^## |\Z)", file.read_text("utf-8"), re.M | re.S)
    if found is None:
        raise SystemExit(f"{file.name} has no section {heading!r}: change the page in docs/ that shows it.")
    return found[1].strip()


# -- what is made from the code --------------------------------------------------------------------


def code(name: str) -> str:
    """A file as a block of code."""
    file = ROOT / name
    language = {".py": "python", ".yaml": "yaml", ".toml": "toml"}.get(file.suffix, "text")
    return f"````{language}\n{file.read_text(encoding='utf-8').rstrip()}\n````"


def options(_: str) -> str:
    """Every option of a training, by the groups of its help."""
    from unisd.options.option import declared
    from unisd.options.table import GROUPS, UniSDOptions
    from unisd.run.options import RUN_GROUPS, RunOptions

    lines: list[str] = []
    for kind, groups in ((RunOptions, RUN_GROUPS), (UniSDOptions, GROUPS)):
        for group in groups:
            items = [item for item in declared(kind) if item.metadata["group"] == group]
            lines += [f"## {group.capitalize()}", ""] if items else []
            for item in items:
                lines += [f"### `--{item.name}` {{ #{item.name} }}", "", escaped(item.metadata["help"]), ""]
                lines += [facts(item), "{ .facts }", ""]
    return "\n".join(lines)


def facts(item: Field[Any]) -> str:
    """What an option's declaration says beside its help."""
    data = item.metadata
    made = item.default_factory() if item.default_factory is not MISSING else item.default
    low, high = data["range"]
    said = [f"default: `{made}`" if made is not None and made != [] else "default: unset"]
    said += [f"one of: {', '.join(f'`{one}`' for one in data['choices'])}"] if data["choices"] else []
    said += [f"at least {low:g}"] if low > float("-inf") else []
    said += [f"at most {high:g}"] if high < float("inf") else []
    said += [f"excludes [`{data['excludes']}`](#{data['excludes']})"] if data["excludes"] else []
    said += [f"also of: {', '.join(f'`unisd {one}`' for one in data['shared'])}"] if data["shared"] else []
    return " · ".join(said)


def escaped(text: str) -> str:
    """Text of help as Markdown: nothing in it is markup but backticks."""
    return re.sub(r"(?<!`)([*_<>\[\]])(?![^`]*`[^`]*$)", r"\\\1", text)


def inherited(_: str) -> str:
    """What becomes of the options of transformers."""
    from unisd.options.inherited import HARMLESS, REFUSED, WORKS

    rows = [f"| `{name}` | {why} |" for name, why in sorted({**REFUSED, **HARMLESS}.items())]
    lines = [
        f"These work as in transformers: {', '.join(f'`{name}`' for name in sorted(WORKS))}.",
        "",
        "These are refused, or say what is so anyway:",
        "",
        "| option | why, and what to do |",
        "|---|---|",
    ]
    return "\n".join(lines + rows)


def commands(_: str) -> str:
    """The help of every command but `train`, whose options have a page."""
    from unisd.cli.main import main

    names = sorted(set(re.findall(r"^\s*unisd ([a-z]\w*)", help_of(main, []), re.M)) - {"train"})
    blocks = [f"## unisd {name}\n\n```text\n{help_of(main, [name])}\n```\n" for name in names]
    return "\n".join(blocks)


def help_of(main: Callable[[list[str]], int], command: list[str]) -> str:
    text = io.StringIO()
    os.environ["COLUMNS"] = "100"
    with redirect_stdout(text):
        main([*command, "--help"])
    return text.getvalue().strip()


def api(_: str) -> str:
    """The public names, from their docstrings."""
    import unisd

    names = [name for name in unisd.__all__ if not name.startswith("_")]
    return "\n".join(f"::: unisd.{name}\n" for name in names)


def registered() -> Iterator[tuple[str, str, str]]:
    """Kind, name and dotted path of all weights, targets and terms: read, not imported."""
    for file in sorted((ROOT / "src/unisd/methods").glob("*.py")):
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            for call in getattr(node, "decorator_list", ()):
                named = re.match(r"register_(\w+)\('(\w+)'", ast.unparse(call))
                if named is not None:
                    yield named[1], named[2], f"unisd.methods.{file.stem}.{node.name}"


def recipes(_: str) -> str:
    """A section for each recipe: what it is, its evidence, its options and its equations."""
    from unisd import recipes as library

    plugins = {(kind, name): path for kind, name, path in registered()}
    shown: set[str] = set()
    lines = []
    for name in library.names():
        recipe = library.load(name)
        own = {key: value for key, value in recipe.options.items() if key not in shared_options()}
        used = [path for kind, of in plugins_of(own) if (path := plugins.get((kind, of)))]
        papers = sorted(set(ARXIV.findall(recipe.files[0].read_text(encoding="utf-8"))))
        lines += [
            f"## {name}",
            "",
            recipe.description,
            "",
            f"*Evidence and weakness:* {recipe.evidence}.",
            "",
        ]
        if papers:
            links = (f"[arXiv {paper}](https://arxiv.org/abs/{paper})" for paper in papers)
            lines += [f"*Papers:* {', '.join(links)}", ""]
        lines += ["```yaml", *(f"{key}: {value}" for key, value in own.items()), "```", ""]
        lines += [f"Try it: `unisd train --recipe {name}`. The recipe's file:", ""]
        lines += [f'??? quote "{file.name}"\n\n{indented(file)}\n' for file in recipe.files]
        for path in used:
            lines += [f"Its equation: [`{path}`][{path}].", ""]
        shown.update(used)
    lines += ["## Equations", "", "Every token weight, target and term of the loss, with its code.", ""]
    lines += [block for path in plugins.values() for block in (f"::: {path}", "")]
    return "\n".join(lines)


def indented(file: Path) -> str:
    text = code(str(file.relative_to(ROOT)))
    return "\n".join(f"    {line}".rstrip() for line in text.splitlines())


def shared_options() -> dict[str, Any]:
    import yaml

    text = (ROOT / "src/unisd/recipes/_published.yaml").read_text(encoding="utf-8")
    return dict(yaml.safe_load(text))


def plugins_of(values: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Kind and name of the plug-ins that a recipe's options ask for."""
    for kind, option in (("weight", "token_weights"), ("term", "terms"), ("target", "target")):
        asked = values.get(option) or []
        for one in [asked] if isinstance(asked, str) else asked:
            yield kind, one.partition(":")[0]
    if values.get("agreement", "none") != "none":
        yield "weight", f"agreement_{values['agreement']}"
    for option, name in (("contrastive_weight", "contrast"), ("feature_weight", "features")):
        if values.get(option):
            yield "term", name


MADE: dict[str, Callable[[str], str]] = {
    "code": code,
    "options": options,
    "inherited": inherited,
    "commands": commands,
    "api": api,
    "recipes": recipes,
}

if __name__ == "__main__":
    sys.exit(build())
