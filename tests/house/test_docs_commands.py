"""What the documents name is there: commands, their options, modules, files and links.

Nothing is run here but `--help`, and the commands of blocks up to what they would load first. Words
in capitals and `...` are placeholders.
"""

from __future__ import annotations

import importlib
import io
import re
import shlex
from contextlib import redirect_stdout
from functools import cache
from itertools import dropwhile, pairwise, product, takewhile
from pathlib import Path

import pytest

from unisd import console, recipes
from unisd.cli import report as cli_report
from unisd.cli.main import main

ROOT = next(folder for folder in Path(__file__).resolve().parents if (folder / "pyproject.toml").exists())
GUIDES = sorted(
    [
        *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "experiments/README.md")),
        *ROOT.glob("docs/**/*.md"),
        *ROOT.glob("src/unisd/**/*.md"),
    ]
)
OURS = ("unisd", "experiments", "benchmarks", "examples", "tests")
FOLDERS = ("src/", "docs/", "tests/", "examples/", "experiments/", "benchmarks/", ".github/", ".ci/")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.M | re.S)
CODE = re.compile(r"(?<!`)`([^`]+)`(?!`)")
COMMAND = re.compile(r"\s*(?:[A-Z_0-9]+=\S+ )*(?:unisd|python|pytest|make|torchrun|srun|cp|pip|ruff)\s")
WRITES = ("--output", "--output_dir", "--json", "--figures")  # what follows need not be there yet


def blocks(text: str) -> list[str]:
    """The fenced blocks of a shell."""
    return [body for language, body in FENCE.findall(text) if language in ("", "bash", "sh")]


def spans(text: str) -> list[str]:
    """What stands between single backticks."""
    return [" ".join(span.split()) for span in CODE.findall(FENCE.sub("", text))]


def commands(text: str) -> list[list[str]]:
    """The words of every command, in blocks and between backticks."""
    lines = [line for block in blocks(text) for line in block.replace("\\\n", " ").splitlines()]
    found = []
    for line in [*lines, *spans(text)]:
        for part in re.split(r"&&|\|\|?|;", re.sub(r"(^|\s)#.*", "", line)):
            if COMMAND.match(part):
                words = shlex.split(part)
                found.append(list(dropwhile(lambda word: re.match(r"[A-Z_0-9]+=", word), words)))
    return found


def each_command() -> list[tuple[str, list[str]]]:
    return [
        (str(guide.relative_to(ROOT)), words)
        for guide in GUIDES
        if guide.exists()
        for words in commands(guide.read_text(encoding="utf-8"))
    ]


def flags(words: list[str]) -> list[str]:
    return [word[2:].partition("=")[0] for word in words if re.match(r"--\w", word)]


def unisd_arguments(words: list[str]) -> list[str] | None:
    """What follows `unisd` in `unisd ...`, `python -m unisd ...`, `torchrun ... -m unisd ...`."""
    if words[0] == "unisd":
        return words[1:]
    if ("-m", "unisd") in pairwise(words):
        return words[words.index("unisd") + 1 :]
    return None


@cache
def known_flags(command: str) -> frozenset[str]:
    """The options that a command's help shows; `study` passes those of `train` on to its runs."""
    text = io.StringIO()
    with redirect_stdout(text):
        assert main([command, "--help_all" if command == "train" else "--help"]) == 0, command
    passed_on = known_flags("train") if command == "study" else frozenset()
    return frozenset(re.findall(r"--(\w+)", text.getvalue())) | {"help", "help_all"} | passed_on


@cache
def command_names() -> frozenset[str]:
    text = io.StringIO()
    with redirect_stdout(text):
        main(["--help"])
    return frozenset(re.findall(r"^\s*unisd ([a-z]\w*)", text.getvalue(), re.M))


def problem_of_unisd(arguments: list[str]) -> str | None:
    """What is wrong with the arguments of `unisd`."""
    if not arguments or not re.match(r"[a-z]", command := arguments[0]):
        return None  # --version, or a placeholder
    if command not in command_names():
        return f"there is no command {command}"
    if unknown := sorted(set(flags(arguments)) - known_flags(command)):
        return f"unisd {command} has no option --{unknown[0]}"
    named = {word: value for word, value in zip(arguments, [*arguments[1:], ""], strict=True)}
    recipe = arguments[1] if command == "recipes" and len(arguments) > 1 else named.get("--recipe")
    if recipe and re.match(r"[a-z]", recipe) and recipe not in recipes.names():
        return f"there is no recipe {recipe}"
    return None


def module_file(name: str) -> Path | None:
    """The file of a module of ours; of a package its `__init__.py`."""
    base = (ROOT / "src" if name.split(".")[0] == "unisd" else ROOT) / name.replace(".", "/")
    return next((p for p in (base.with_suffix(".py"), base / "__init__.py") if p.exists()), None)


def problem_of_python(words: list[str]) -> str | None:
    """What is wrong with `python -m MODULE ...` or `python FILE ...`, as far as it is ours."""
    if words[1] == "-m":
        file = module_file(words[2])
        if words[2].split(".")[0] not in OURS:
            return None
        if file is not None and file.name == "__init__.py":
            file = file.with_name("__main__.py")
        if file is None or not file.exists():
            return f"there is no module {words[2]} to run"
    else:
        file = ROOT / words[1]
        if not file.is_file():
            return f"there is no file {words[1]}"
    source = file.read_text(encoding="utf-8")
    if '__name__ == "__main__"' not in source and file.name != "__main__.py":
        return f"{file.relative_to(ROOT)} does nothing when it is run"
    # `grid` gives every comparison its common options.
    source += (ROOT / "experiments/grid.py").read_text(encoding="utf-8")
    for flag in flags(words):
        if not re.search(rf"[\"'](--)?{flag}[\"']", source):
            return f"{file.relative_to(ROOT)} has no option --{flag}"
    return None


def expanded(word: str) -> list[str]:
    """`a/{b,c}.json` as the shell takes it."""
    parts = [
        part[1:-1].split(",") if part.startswith("{") else [part] for part in re.split(r"(\{[^}]*\})", word)
    ]
    return ["".join(choice) for choice in product(*parts)]


def missing_files(words: list[str]) -> list[str]:
    """Files and folders of the repository that a command reads and that are not there."""
    read = [word for before, word in zip(["", *words], words, strict=False) if before not in WRITES]
    paths = [path.partition("::")[0] for word in read for path in expanded(word)]
    return [path for path in paths if path.startswith(FOLDERS) and not (ROOT / path).exists()]


def test_commands_and_their_options_exist() -> None:
    found = []
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
    for guide, words in each_command():
        arguments = unisd_arguments(words)
        problem = None
        if arguments is not None:
            problem = problem_of_unisd(arguments)
        elif words[0] == "python" and words[-1] != "-m":
            problem = problem_of_python(words)
        elif words[0] == "make":
            problem = next((f"make has no target {w}" for w in words[1:] if w not in targets), None)
        missing = missing_files(words)
        if problem or missing:
            found.append(f"{guide}: {shlex.join(words)}: {problem or f'there is no {missing[0]}'}")
    assert not found, "\n".join(found)


def understood(arguments: list[str]) -> int:
    """Carry a command out up to what it loads first; files and runs that it reads are made.

    Returns its exit code: 130, as of one that is interrupted, if it got there; 0: it ended before.
    """
    arguments = list(takewhile(lambda word: word != "<", (word for word in arguments if word != "...")))
    for flag, value in pairwise(arguments):
        if (
            flag in ("--config", "--accelerate_config")
            and value.endswith(".yaml")
            and not Path(value).exists()
        ):
            Path(value).parent.mkdir(parents=True, exist_ok=True)
            Path(value).write_text("model_name_or_path: pocket\n", encoding="utf-8")
    for folder in (word for word in arguments[1:] if arguments[0] == "report" and "--" not in word):
        Path(folder).mkdir(parents=True, exist_ok=True)
    return main(arguments)


@pytest.mark.long
def test_commands_of_blocks_are_understood(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Flags, their values and what excludes what: all that is checked before a model is loaded."""

    def stop(what: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(console, "loading", stop)
    monkeypatch.setattr(cli_report, "loading", stop)
    importlib.import_module("transformers.training_args")  # with values of its options
    monkeypatch.chdir(tmp_path)
    for name in ("examples", "docs"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n', encoding="utf-8")
    study = tmp_path / "unisd-study" / "pocket"
    study.mkdir(parents=True)
    for name in ("runs.jsonl", "study.yaml"):
        (study / name).symlink_to(ROOT / "docs/results/pocket-study" / name)
    seen, found = 0, []
    for guide in GUIDES:
        text = guide.read_text(encoding="utf-8")
        for words in commands("".join(f"```\n{block}```\n" for block in blocks(text))):
            if (arguments := unisd_arguments(words)) is not None:
                seen += 1
                if understood(arguments) not in (0, 130):
                    said = capsys.readouterr().err.strip()
                    found.append(f"{guide.relative_to(ROOT)}: {shlex.join(words)}: {said}")
    assert not found, "\n".join(found)
    assert seen > 60
    assert understood(["train", "--learning_rate", "high"]) == 2


def test_the_parser_of_documents_finds_what_is_wrong() -> None:
    block = "unisd eval --modle M \\\n  --json f.json  # why\ncd x && unisd train --recipe sfdt\n"
    text = f"`unisd trian`\n\n```\n{block}```\n"
    assert commands(text) == [
        ["unisd", "eval", "--modle", "M", "--json", "f.json"],
        ["unisd", "train", "--recipe", "sfdt"],
        ["unisd", "trian"],
    ]
    assert problem_of_unisd(["trian"]) == "there is no command trian"
    assert problem_of_python(["python", "-m", "unisd.errors"]) is not None
    assert (
        problem_of_python(["python", "-m", "experiments.pocket_page", "--most", "1", "--colour"]) is not None
    )
    assert missing_files(["cp", "docs/{field,gone}.md", "--output", "docs/new.md"]) == ["docs/gone.md"]


NAMED_MODULE = re.compile(r"(?:unisd|experiments|benchmarks)(?:\.\w+)+")
ENTRY_POINTS = {"unisd.token_weights", "unisd.targets", "unisd.terms", "unisd.tasks"}


def is_there(name: str) -> bool:
    """Whether a dotted name is a module of ours, stands in one, or is a group of entry points."""
    if name in ENTRY_POINTS:
        return True
    parts = name.split(".")
    for cut in range(len(parts), 0, -1):
        if (file := module_file(".".join(parts[:cut]))) is not None:
            text = file.read_text(encoding="utf-8")
            return all(re.search(rf"\b{part}\b", text) for part in parts[cut:])
    return False


@pytest.mark.parametrize("guide", [g for g in GUIDES if g.exists()], ids=lambda g: str(g.relative_to(ROOT)))
def test_modules_and_files_that_documents_name_exist(guide: Path) -> None:
    text, gone = guide.read_text(encoding="utf-8"), []
    for span in spans(text):
        if NAMED_MODULE.fullmatch(span) and not is_there(span):
            gone.append(span)
        if span.startswith(FOLDERS) and "*" not in span and " " not in span:
            gone += [path for path in expanded(span.partition("::")[0]) if not (ROOT / path).exists()]
        elif re.fullmatch(r"[a-z_/]+\.(py|css|js)", span) and not any(ROOT.glob(f"**/{span}")):
            gone.append(span)
    for link in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", FENCE.sub("", text)):
        if not re.match(r"\w+:", link) and not (guide.parent / link).exists():
            gone.append(link)
    for name in re.findall(r"^\s*(?:from|import) (\S+)", text, re.M):
        if name.startswith("unisd") and not is_there(name):
            gone.append(name)
    assert not gone, gone


def test_modules_that_docstrings_name_exist() -> None:
    found = []
    sources = [
        path
        for top in ("src", "experiments", "benchmarks", "examples")
        for path in (ROOT / top).rglob("*.py")
    ]
    for path in sources:
        text = path.read_text(encoding="utf-8")
        names = re.findall(r":(?:mod|class|func|meth):`~?([\w.]+)`", text)
        names += [span for span in CODE.findall(text) if NAMED_MODULE.fullmatch(span)]
        found += [f"{path.relative_to(ROOT)}: {name}" for name in names if "." in name and not is_there(name)]
    assert not found, "\n".join(found)


def test_the_file_tree_of_the_guide_is_the_tree() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    (tree,) = [block for block in blocks(text) if block.startswith("src/unisd/\n")]
    shown = set(re.findall(r"^  (\S+)", tree, re.M))
    here = {path.name + "/" * path.is_dir() for path in (ROOT / "src/unisd").iterdir()}
    assert shown == here - {"__pycache__/", "__init__.py", "__main__.py", "py.typed"}
