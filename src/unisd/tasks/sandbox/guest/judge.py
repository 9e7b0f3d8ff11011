"""Runs the tests.

Names that they do not define themselves stand for the code's functions, reached over the channel.
"""

from __future__ import annotations

import ast
import builtins
import contextlib
import importlib
import json
import os
import sys
from typing import Any

from .confine import confine
from .values import Channel, ChannelClosed, dump, load

MAX_MESSAGE_TEXT = 300


class Outcome(Exception):
    """The verdict is out: its reason and detail."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail[:MAX_MESSAGE_TEXT]


class Remote:
    """An object of the worker's.

    Equal to itself alone: what it says of its equality is never asked.
    """

    __slots__ = ("_judge", "_number")

    def __init__(self, judge: Judge, number: int) -> None:
        object.__setattr__(self, "_judge", judge)
        object.__setattr__(self, "_number", number)

    def _ask(self, op: str, *args: Any, **kwargs: Any) -> Any:
        return self._judge.ask(op, self._number, list(args), kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._ask("call", *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name.endswith("__") and name not in ("__name__", "__doc__"):
            raise AttributeError(name)  # protocols that a plain object does not have
        return self._ask("get", name)

    def __setattr__(self, name: str, value: Any) -> None:
        self._ask("set", name, value)

    def __getitem__(self, key: Any) -> Any:
        return self._ask("item", key)

    def __iter__(self) -> Any:
        return iter(_exactly(list, self._ask("list")))

    def __len__(self) -> int:
        return _exactly(int, self._ask("len"))  # type: ignore[no-any-return]

    def __bool__(self) -> bool:
        return _exactly(bool, self._ask("bool"))  # type: ignore[no-any-return]

    def __str__(self) -> str:
        return _exactly(str, self._ask("str"))  # type: ignore[no-any-return]

    def __repr__(self) -> str:
        return _exactly(str, self._ask("repr"))  # type: ignore[no-any-return]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Remote) and other._number == self._number

    def __hash__(self) -> int:
        return hash(("remote", self._number))


def _exactly(kind: type, value: Any) -> Any:
    if type(value) is not kind:
        raise TypeError(f"the code's object gave {type(value).__name__} where {kind.__name__} is due")
    return value


class Judge:
    def __init__(self, channel: Channel) -> None:
        self.channel = channel
        self.functions: list[Any] = []  # of the tests, given to the code as arguments

    def hold(self, value: Any) -> list[Any]:
        if isinstance(value, Remote):
            return ["h", value._number]
        self.functions.append(value)
        return ["g", len(self.functions) - 1]

    def find(self, data: list[Any]) -> Any:
        if len(data) != 2 or type(data[1]) is not int:
            raise ValueError("no value")
        return Remote(self, data[1]) if data[0] == "h" else self.functions[data[1]]

    def ask(self, op: str, number: int, args: list[Any], kwargs: dict[str, Any]) -> Any:
        self.channel.send(
            {"op": op, "on": number, "args": dump(args, self.hold), "kwargs": dump(kwargs, self.hold)}
        )
        reply = self.receive()
        if "raise" in reply:
            raise _exception(reply["raise"])
        if op == "call":
            for mine, theirs in zip(args, load(reply["args"], self.find), strict=True):
                _take_over(mine, theirs)
        return load(reply["value"], self.find)

    def receive(self) -> dict[str, Any]:
        """The worker's reply; calls of the tests' functions are served meanwhile."""
        while "back" in (message := self.channel.receive()):
            try:
                function = self.functions[message["back"]]
                value = function(*load(message["args"], self.find), **load(message["kwargs"], self.find))
                self.channel.send({"value": dump(value, self.hold)})
            except (ChannelClosed, Outcome):
                raise
            except Exception as error:
                self.channel.send({"raise": [type(error).__name__, str(error)[:MAX_MESSAGE_TEXT]]})
        return message

    def start(self, wanted: list[str]) -> dict[str, Any]:
        with contextlib.suppress(ChannelClosed):  # code that failed has said so and is gone
            self.channel.send({"want": wanted})
        reply = self.channel.receive()
        if "failed" in reply:
            name, text = (str(part) for part in reply["failed"])
            reason = {"SyntaxError": "syntax", "IndentationError": "syntax", "MemoryError": "memory"}.get(
                name, "error"
            )
            raise Outcome(reason, f"{name}: {text}")
        return {name: load(value, self.find) for name, value in reply["names"].items() if name in wanted}


def _exception(raised: Any) -> Exception:
    """The code's exception in the tests: of the same built-in class, or one that no test waits for.

    Never one that would end a loop of the tests early.
    """
    name, text = (str(part) for part in raised)
    kind = getattr(builtins, name, None)
    if (
        isinstance(kind, type)
        and issubclass(kind, Exception)
        and not issubclass(kind, (StopIteration, StopAsyncIteration))
    ):
        try:
            return kind(text)
        except Exception:  # some want more than a text
            pass
    return RuntimeError(f"{name}: {text}")


def _take_over(mine: Any, theirs: Any) -> None:
    """What the code did to a container that it was given."""
    if type(mine) is not type(theirs):
        return
    if isinstance(mine, (list, bytearray)):
        if mine != theirs:
            mine[:] = theirs
    elif isinstance(mine, (dict, set)) and mine != theirs:
        mine.clear()
        mine.update(theirs)


def bound_in(tree: ast.AST) -> set[str]:
    """List the names that the code defines, assigns or takes as arguments, at any depth.

    Imports are left out.
    """
    bound = set()
    for part in ast.walk(tree):
        if isinstance(part, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            bound.add(part.name)
        elif isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store):
            bound.add(part.id)
        elif isinstance(part, ast.arg):
            bound.add(part.arg)
        elif isinstance(part, ast.ExceptHandler) and part.name:
            bound.add(part.name)
    return bound


def imports_of(code: str) -> tuple[list[str], set[str]]:
    """Top-level imports of the code from the standard library, and names that it binds otherwise.

    Tests may lean on `import math` in the code; they then get the real module, not what the code
    made of it. An import under another name is not followed: the code would choose what the tests
    see as `math`.
    """
    try:
        tree = ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return [], set()
    imports = []
    for node in tree.body:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            node.names = [alias for alias in node.names if alias.asname in (None, alias.name)]
        if isinstance(node, ast.Import):
            imports += [ast.unparse(ast.Import([alias])) for alias in node.names if _standard(alias.name)]
        elif (
            isinstance(node, ast.ImportFrom)
            and node.names
            and node.level == 0
            and _standard(node.module or "")
        ):
            imports.append(ast.unparse(node))
    return imports, bound_in(tree)


def modules_of(tests: ast.AST) -> dict[str, Any]:
    """List the standard modules that the tests use as such (`math.isclose`).

    It does not matter whether anyone imported them.
    """
    found: dict[str, Any] = {}
    for node in ast.walk(tests):
        if (
            isinstance(node, ast.Attribute)
            and isinstance(node.value, ast.Name)
            and _standard(name := node.value.id)
        ):
            with contextlib.suppress(Exception):
                module = importlib.import_module(name)
                if hasattr(module, node.attr):
                    found[name] = module
    return found


def _standard(module: str) -> bool:
    return module.partition(".")[0] in sys.stdlib_module_names and module != "__future__"


def run_tests(judge: Judge, code: str, tests: str) -> None:
    """Raises `Outcome` unless every test holds."""
    try:
        tree = ast.parse(tests)
        compiled = compile(tests, "tests", "exec")
    except (SyntaxError, ValueError) as error:
        raise Outcome("error", f"the tests do not compile: {error}") from None
    namespace: dict[str, Any] = {"__name__": "tests"}
    imports, bound = imports_of(code)
    for statement in imports:
        imported: dict[str, Any] = {}
        try:
            exec(statement, imported)
        except Exception:
            continue
        namespace |= {
            name: value
            for name, value in imported.items()
            if name not in bound and not hasattr(builtins, name)
        }
    namespace.pop("__builtins__", None)
    namespace = modules_of(tree) | namespace
    # A built-in that the code redefines stays what it is here: `set`, `len` and `abs` belong to the
    # tests.
    used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)} - set(namespace)
    wanted = {name for name in used if not hasattr(builtins, name)}
    imported_here = {alias.asname or alias.name for alias in ast.walk(tree) if isinstance(alias, ast.alias)}
    # Tests that name nothing but built-ins test the code's own version of one.
    about = set() if wanted - bound_in(tree) - imported_here else used & bound - wanted
    given = judge.start(sorted(wanted | about))
    if len(redefined := sorted(about & set(given))) > 1:
        raise Outcome(
            "error", f"the code redefines several built-ins that the tests use: {', '.join(redefined)}"
        )
    namespace |= given
    try:
        exec(compiled, namespace)
    except (ChannelClosed, Outcome):
        raise
    except AssertionError as error:
        raise Outcome("wrong", _where(error, tests) or "an assertion failed") from None
    except MemoryError:
        raise Outcome("memory", "out of memory") from None
    except BaseException as error:
        raise Outcome("error", f"{type(error).__name__}: {error}") from None
    if judge.channel.closed is not None:  # in a test that takes any exception for right
        raise judge.channel.closed


def _where(error: BaseException, tests: str) -> str:
    """The line of the tests that failed."""
    trace, line = error.__traceback__, 0
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == "tests":
            line = trace.tb_lineno
        trace = trace.tb_next
    lines = tests.splitlines()
    return lines[line - 1].strip() if 0 < line <= len(lines) else ""


def main() -> None:
    setting = json.load(sys.stdin)
    confine(setting["limits"])
    verdict_fd = setting["verdict_fd"]
    outcome = ("passed", "")
    try:
        run_tests(Judge(Channel(*setting["fds"])), setting["code"], setting["tests"])
    except Outcome as found:
        outcome = (found.reason, found.detail)
    except ChannelClosed as error:
        outcome = ("ended", str(error))
    except BaseException as error:
        outcome = ("error", f"{type(error).__name__}: {error}"[:MAX_MESSAGE_TEXT])
    os.write(verdict_fd, json.dumps(outcome).encode())
    os._exit(0)
