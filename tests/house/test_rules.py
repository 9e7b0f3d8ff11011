"""The rules of the source tree: directions of imports, sizes, who may ask for the hardware.

Each rule is a function from source text (or folders) to a list of violations, and is tried on
made-up text that breaks it.
"""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from setuptools import find_namespace_packages

ROOT = Path(__file__).parents[2]
while not (ROOT / "pyproject.toml").is_file():  # wherever the tests lie in the repository
    ROOT = ROOT.parent
SOURCE = ROOT / "src"
PACKAGE = SOURCE / "unisd"
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))

FILE_LINES, FUNCTION_LINES, LINE_CHARACTERS, PARAMETERS = 500, 60, 110, 8
SMALLER_FILES = {"unisd/trainer.py": 399}
NOT_COUNTED = {"self", "cls", "ctx"}
MAY_HAVE_MORE_PARAMETERS = {
    "unisd/losses/triton_kernels.py:_moments_kernel": "a Triton kernel takes scalars and pointers only",
    "unisd/losses/triton_kernels.py:_divergence_kernel": "a Triton kernel takes scalars and pointers only",
    "unisd/losses/triton_kernels.py:_gradient_kernel": "a Triton kernel takes scalars and pointers only",
    "unisd/kernels/attention.py:packed_sdpa": "transformers calls attention functions with these",
    "unisd/trainer.py:__init__": "those of transformers' Trainer, and our own",
}

MAY_ASK_FOR_HARDWARE = (
    "unisd/kernels/",
    "unisd/distributed/",
    "unisd/memory.py",
    "unisd/losses/chunked.py",
    "unisd/losses/triton_kernels.py",
    "unisd/rollout/decoding.py",
)
METHODS_MAY_IMPORT = ("unisd.methods", "unisd.data.privilege", "unisd.errors")
LABORATORY = ("experiments", "benchmarks", "tests")


def sources(folder: Path) -> Iterator[tuple[str, str]]:
    """Each module in a folder: its path from `src` or the repository, and its text."""
    root = SOURCE if folder.is_relative_to(SOURCE) else ROOT
    for path in sorted(folder.rglob("*.py")):
        yield path.relative_to(root).as_posix(), path.read_text(encoding="utf-8")


parsed = cache(ast.parse)  # every rule reads the same files


def check_each(rule: Callable[[str, str], list[str]], *folders: Path) -> None:
    found = [line for folder in folders for path, text in sources(folder) for line in rule(path, text)]
    assert not found, "\n" + "\n".join(found)


# ---------------------------------------------------------------------------------------- the rules


def too_large(path: str, text: str) -> list[str]:
    """A file, a line, a function or a list of parameters that is too long."""
    lines = text.splitlines()
    most = SMALLER_FILES.get(path, FILE_LINES)
    found = [f"{path}: {len(lines)} lines, over {most}"] if len(lines) > most else []
    found += [
        f"{path}:{number}: {len(line)} characters, over {LINE_CHARACTERS}"
        for number, line in enumerate(map(without_pragma, lines), 1)
        if len(line) > LINE_CHARACTERS
    ]
    for name, function in functions(path, text):
        length = (function.end_lineno or function.lineno) - function.lineno + 1
        if length > FUNCTION_LINES:
            found.append(f"{name}: {length} lines, over {FUNCTION_LINES}")
        count = parameters(function)
        if count > PARAMETERS and name not in MAY_HAVE_MORE_PARAMETERS:
            found.append(f"{name}: {count} parameters, over {PARAMETERS}")
    return found


def without_pragma(line: str) -> str:
    """A line without what tells a checker to be silent: the formatter leaves it there."""
    return re.sub(r"\s+# (type: ignore|noqa|pragma:).*$", "", line)


def functions(path: str, text: str) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    for node in ast.walk(parsed(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield f"{path}:{node.name}", node


def parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    given = function.args
    named = [p.arg for p in (*given.posonlyargs, *given.args, *given.kwonlyargs)]
    return len([name for name in named if name not in NOT_COUNTED])


def asks_for_hardware(path: str, text: str) -> list[str]:
    """A question for the device's type or for sharding where another package has to answer it."""
    if path.startswith(MAY_ASK_FOR_HARDWARE):
        return []
    found = []
    for node in ast.walk(parsed(text)):
        asked = None
        if isinstance(node, ast.Attribute):
            owner = getattr(node.value, "attr", getattr(node.value, "id", ""))
            if node.attr in ("is_cuda", "is_sharded") or (node.attr == "type" and owner == "device"):
                asked = f"{owner}.{node.attr}"
        elif isinstance(node, ast.Name) and node.id == "is_sharded":
            asked = node.id
        if asked is not None:
            found.append(f"{path}:{node.lineno}: {asked}")
    return found


def says_nothing(path: str, text: str) -> list[str]:
    """A text that stands alone and documents nothing: mostly the second line of another."""
    found = []
    for node in ast.walk(parsed(text)):
        for field in ("body", "orelse", "finalbody"):
            block = getattr(node, field, None)
            before: ast.AST = node
            for line in block if isinstance(block, list) else ():
                value = line.value if isinstance(line, ast.Expr) else None
                is_text = isinstance(value, ast.JoinedStr) or isinstance(getattr(value, "value", None), str)
                if is_text and not isinstance(before, DOCUMENTED):
                    found.append(f"{path}:{line.lineno}: a text that nothing reads")
                before = line
    return found


DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef, ast.Assign, ast.AnnAssign)


def imported(text: str) -> Iterator[tuple[int, str]]:
    """Every absolute import, also one within a function: its line and the module's name."""
    for node in ast.walk(parsed(text)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def imports_laboratory(path: str, text: str) -> list[str]:
    return [f"{path}:{line}: {name}" for line, name in imported(text) if name.split(".")[0] in LABORATORY]


def imports_more_than_mathematics(path: str, text: str) -> list[str]:
    """An import of a method beyond torch, other methods, levels of privilege and errors."""
    return [
        f"{path}:{line}: {name}"
        for line, name in imported(text)
        if name.split(".")[0] == "unisd"
        and not f"{name}.".startswith(tuple(f"{m}." for m in METHODS_MAY_IMPORT))
    ]


def packaged_but_not_ours(root: Path) -> list[str]:
    """Packages that the wheel would hold beside `unisd`."""
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))
    options = project["tool"]["setuptools"]["packages"]["find"]
    found: list[str] = []
    for where in options.get("where", ["."]):
        found += find_namespace_packages(
            str(root / where), options.get("exclude", ()), options.get("include", ("*",))
        )
    return [name for name in found if name.split(".")[0] != "unisd" and not name.endswith("egg-info")]


def loaded_with(modules: tuple[str, ...], unwanted: tuple[str, ...], folder: Path) -> list[str]:
    """Which of the `unwanted` modules a new process has loaded after importing `modules`."""
    code = f"import sys, {', '.join(modules)}\nprint(*(name for name in {unwanted} if name in sys.modules))"
    return run_python(code, folder).stdout.split()


def broken_contracts(config: Path, *folders: Path) -> list[str]:
    """Names of the import contracts that packages in `folders` break; prints the report."""
    code = (
        "import sys; from importlinter.cli import lint_imports;"
        f" sys.exit(lint_imports({str(config)!r}, no_cache=True, no_logo=True))"
    )
    said = run_python(code, *folders, check=False)
    print(said.stdout, said.stderr)
    broken = re.findall(r"^(.+) BROKEN$", said.stdout, re.MULTILINE)
    assert bool(said.returncode) == bool(broken), "the contracts could not be checked"
    return broken


def run_python(code: str, *folders: Path, check: bool = True) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, folders)), "COLUMNS": "200"}
    return subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        check=check,
        capture_output=True,
        text=True,
        cwd=folders[0],
    )


# ------------------------------------------------------------------------------ the tree keeps them


def test_no_import_goes_up() -> None:
    assert broken_contracts(ROOT / "pyproject.toml", SOURCE, ROOT) == []


def test_files_and_functions_are_small() -> None:
    check_each(too_large, PACKAGE, ROOT / "benchmarks")


def test_no_text_is_cut_off() -> None:
    check_each(says_nothing, PACKAGE, ROOT / "benchmarks", ROOT / "experiments", ROOT / "tests")


def test_every_exception_is_still_needed() -> None:
    over = {
        name
        for path, text in sources(PACKAGE)
        for name, function in functions(path, text)
        if parameters(function) > PARAMETERS
    }
    assert sorted(MAY_HAVE_MORE_PARAMETERS.keys() - over) == []


def test_hardware_is_asked_for_where_it_is_dealt_with() -> None:
    check_each(asks_for_hardware, PACKAGE)


def test_the_wheel_knows_no_laboratory() -> None:
    check_each(imports_laboratory, PACKAGE)
    assert packaged_but_not_ours(ROOT) == []


def test_studies_and_reports_need_no_torch() -> None:
    paths = [path for room in ("study", "report") for path in sorted((PACKAGE / room).glob("[a-z]*.py"))]
    modules = ("unisd.study", "unisd.report", *(f"unisd.{path.parent.name}.{path.stem}" for path in paths))
    assert loaded_with(modules, ("torch", "transformers"), SOURCE) == []


def test_methods_are_mathematics() -> None:
    check_each(imports_more_than_mathematics, PACKAGE / "methods")


# -------------------------------------------------------------------------- each rule can be broken


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("pass\n" * 501, "x.py: 501 lines"),
        (f"a = '{'b' * 110}'\n", "x.py:1: 116 characters"),
        ("def f():\n" + "    pass\n" * 60, "x.py:f: 61 lines"),
        ("class A:\n    async def f(self, a, b, c, d, e, /, f, g, *, h, i): ...\n", "x.py:f: 9 parameters"),
    ],
)
def test_what_is_too_large_is_found(text: str, complaint: str) -> None:
    assert [found.partition(", over")[0] for found in too_large("x.py", text)] == [complaint]


def test_what_is_small_enough_is_left_alone() -> None:
    text = "class A:\n    def f(self, a, b, c, d, e, f, g, h, *args, **kwargs):\n" + "        pass\n" * 59
    assert too_large("x.py", text) == []
    assert too_large("unisd/trainer.py", "pass\n" * 400) == ["unisd/trainer.py: 400 lines, over 399"]


@pytest.mark.parametrize("cut", ['return "a"\n    "b"', 'a()\n    f"b {a}"', 'if a:\n        "b"'])
def test_a_text_that_is_cut_off_is_found(cut: str) -> None:
    assert len(says_nothing("x.py", f'"""Says."""\nA = 1\n"""Is."""\ndef f(a):\n    {cut}\n')) == 1


@pytest.mark.parametrize(
    ("line", "asked"),
    [
        ("if x.device.type == 'cpu': pass", "device.type"),
        ("name = device.type", "device.type"),
        ("sharding.is_sharded(model)", "sharding.is_sharded"),
        ("is_sharded(model)", "is_sharded"),
        ("weight.is_cuda", "weight.is_cuda"),
    ],
)
def test_a_question_for_the_hardware_is_found(line: str, asked: str) -> None:
    assert asks_for_hardware("unisd/trainer.py", line) == [f"unisd/trainer.py:1: {asked}"]
    assert asks_for_hardware("unisd/kernels/lora.py", line) == []
    assert asks_for_hardware("unisd/trainer.py", "x.type == 1; x.device") == []


@pytest.mark.parametrize("line", ["import experiments", "from benchmarks.cases import step"])
def test_an_import_of_the_laboratory_is_found(line: str) -> None:
    assert len(imports_laboratory("unisd/a.py", f"def f():\n    {line}\n")) == 1
    assert imports_laboratory("unisd/a.py", "from unisd.files import experiments") == []


@pytest.mark.parametrize(
    "name", ["config.UniSDConfig", "kernels.lora", "models.load", "tasks", "data.privileges"]
)
def test_a_method_that_knows_too_much_is_found(name: str) -> None:
    package, _, thing = f"unisd.{name}".rpartition(".")
    assert len(imports_more_than_mathematics("unisd/methods/a.py", f"from {package} import {thing}")) == 1
    assert (
        imports_more_than_mathematics("unisd/methods/a.py", "from unisd.data.privilege import LEVELS") == []
    )


def test_a_package_of_the_laboratory_in_the_wheel_is_found(tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text('[tool.setuptools.packages.find]\nwhere = ["src"]\n')
    for name in ("unisd/methods", "experiments/deep"):
        (tmp_path / "src" / name).mkdir(parents=True)
    assert sorted(packaged_but_not_ours(tmp_path)) == ["experiments", "experiments.deep"]


def test_a_loaded_torch_is_found(tmp_path: Path) -> None:
    (tmp_path / "torch.py").touch()
    (tmp_path / "light.py").touch()
    (tmp_path / "heavy.py").write_text("def f(): import light\nimport torch\n")
    assert loaded_with(("light",), ("torch", "transformers"), tmp_path) == []
    assert loaded_with(("light", "heavy"), ("torch", "transformers"), tmp_path) == ["torch"]


UP, CIRCLE, MATHEMATICS, OUT = (
    "What is above may import what is below, never the other way round",
    "No circles, anywhere",
    "Methods are mathematics",
    "The package never imports experiments",
)


@pytest.mark.parametrize(
    ("files", "broken"),
    [
        ({"cli/a.py": "import unisd.errors.a"}, []),
        ({"study/a.py": "def f():\n    import unisd.cli.a"}, [UP]),
        ({"data/a.py": "import unisd.tasks.a"}, [UP]),
        ({"files/a.py": "import unisd.processes.a"}, [UP]),  # side by side: neither knows the other
        ({"attic.py": ""}, [UP]),  # a room that no layer names
        ({"methods/a.py": "import unisd.kernels.a"}, [UP]),
        ({"methods/a.py": "import unisd.config.a"}, [UP, MATHEMATICS]),
        ({"data/a.py": "import unisd.data.b", "data/b.py": "import unisd.data.a"}, [CIRCLE]),
        ({"run/a.py": "import experiments"}, [OUT]),
    ],
)
def test_an_import_that_goes_up_is_found(tmp_path: Path, files: dict[str, str], broken: list[str]) -> None:
    """On a made-up tree that has every room of the contracts, and in each room a module `a`."""
    flow = next(c for c in PROJECT["tool"]["importlinter"]["contracts"] if c["type"] == "layers")
    rooms = [room.strip("() ") for layer in flow["layers"] for room in layer.split("|")]
    for package in ("unisd", "experiments", *(f"unisd/{room}" for room in rooms)):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").touch()
        (tmp_path / package / "a.py").touch()
    (tmp_path / "unisd" / "a.py").unlink()
    for name, text in files.items():
        (tmp_path / "unisd" / name).write_text(text)
    assert broken_contracts(ROOT / "pyproject.toml", tmp_path) == broken
