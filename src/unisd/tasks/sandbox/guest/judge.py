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
from collections import deque
from typing import Any

from .confine import confine
from .remote import (
    UNCHANGING,
    Remote,
    async_generator,
    coroutine,
    generator,
    mirrored,
    number_of,
    of_the_tests,
    raised,
    told,
    with_more,
)
from .script import MAX_MESSAGE_TEXT, Outcome, Script
from .values import Channel, ChannelClosed, dump, load


class Judge:
    def __init__(self, channel: Channel) -> None:
        self.channel = channel
        self.functions: list[Any] = []  # of the tests, given to the code as arguments
        self.places: dict[int, int] = {}
        self.objects: dict[int, Any] = {}  # of the code's, by number: each is one object here too
        self.classes: dict[int, Any] = {}  # exceptions of the code's
        self.waiting = 0  # requests without a reply so far

    def hold(self, value: Any) -> list[Any]:
        if (number := number_of(value)) is not None:
            return ["h", number]
        place = self.places.setdefault(id(value), len(self.functions))
        if place == len(self.functions):
            self.functions.append(value)
        name, doc = (getattr(value, about, None) for about in ("__name__", "__doc__"))
        about = [x if type(x) is str else None for x in (name, doc)]
        return ["g", place, *about, type(value).__module__ == "__main__"]

    def dump(self, value: Any) -> Any:
        return dump(value, self.hold, self.of_the_code)

    def of_the_code(self, value: Any, data: Any) -> Any:
        """What was the code's, and cannot have changed, goes back as what it is there."""
        number = number_of(value) if isinstance(value, UNCHANGING) else None
        return data if number is None else ["h", number]

    def find(self, data: list[Any]) -> Any:
        tag, number = data[:2]
        if tag == "X":
            return self.exception(number)
        if type(number) is not int:
            raise ValueError("no value")
        if tag == "g":
            return self.functions[number]
        if tag == "x":
            return self.class_of(data)
        if tag == "w":
            return with_more(data[2], Remote(self, number))
        if tag == "h":
            return self.objects.setdefault(number, Remote(self, number))
        return {"n": generator, "a": coroutine, "A": async_generator}[tag](Remote(self, number))

    def ask(self, op: str, number: int, args: list[Any], kwargs: dict[str, Any]) -> Any:
        self.channel.send({"op": op, "on": number, "args": self.dump(args), "kwargs": self.dump(kwargs)})
        self.waiting += 1
        try:
            reply = self.receive()
        finally:
            self.waiting -= 1
        if "raise" in reply:
            raise self.exception(reply["raise"])
        if op == "call":
            for mine, theirs in zip(args, load(reply["args"], self.find), strict=True):
                _take_over(mine, theirs)
        return load(reply["value"], self.find)

    def receive(self) -> dict[str, Any]:
        """The worker's reply; calls of the tests' functions are served meanwhile."""
        while True:
            message = self.channel.receive()
            if type(printed := message.get("out")) is str:
                sys.stdout.write(printed)
            if "back" not in message:
                return message
            try:
                function = self.functions[message["back"]]
                if "await" in message:
                    value = _finished(function)
                elif "name" in message:
                    value = _attribute(function, message["name"], load(message["args"], self.find))
                else:
                    value = function(*load(message["args"], self.find), **load(message["kwargs"], self.find))
                self.channel.send({"value": self.dump(value)})
            except (ChannelClosed, Outcome):
                raise
            except Exception as error:
                if of_the_tests(error):
                    raise
                self.channel.send({"raise": told(error)})

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
        given = {name: load(value, self.find) for name, value in reply["names"].items() if name in wanted}
        for name, value in given.items():
            if type(value) is Remote and name.lstrip("_")[:1].isupper():
                given[name] = self.objects[value._number] = Remote(self, value._number, makes=True)
        return given

    def exception(self, given: Any) -> Exception:
        """The code's exception in the tests: of the same class, or one that no test waits for.

        Never one that would end a loop of the tests early.
        """
        spec, text = given["class"], str(given["text"])
        kind = self.class_of(spec)
        if kind is RuntimeError and spec != "RuntimeError":
            text = f"{spec if isinstance(spec, str) else spec[2]}: {text}"
            given = {"args": None}
        try:
            return raised(kind, tuple(load(given["args"], self.find)), text, self.find(["h", given["on"]]))
        except Exception:  # some want other arguments than they keep
            pass
        try:
            error = kind(text)
        except Exception:
            error = RuntimeError(f"{kind.__name__}: {text}")
        error.__dict__["_remote"] = None
        return error  # type: ignore[no-any-return]

    def class_of(self, spec: Any) -> Any:
        """The class of an exception: built in, of a module that is at hand, or the code's own."""
        found: Any = None
        if type(spec) is str:
            module, _, name = spec.rpartition(".")
            found = getattr(sys.modules.get(module or "builtins"), name, None)
        elif type(spec) is list and len(spec) == 4 and spec[0] == "x" and type(spec[1]) is int:
            if spec[1] not in self.classes:
                bases = list(dict.fromkeys(self.class_of(base) for base in spec[3]))
                self.classes[spec[1]] = mirrored(self, spec[1], str(spec[2]), bases)
            found = self.classes[spec[1]]
        good = isinstance(found, type) and issubclass(found, Exception)
        return found if good and not issubclass(found, (StopIteration, StopAsyncIteration)) else RuntimeError


def _attribute(target: Any, name: str, new: list[Any]) -> Any:
    """An attribute of an object of a class that the tests define (a node of a list), read or set.

    No other object of theirs lets the code see more than that it can be called.
    """
    kind = type(target)
    hidden = type(name) is not str or name.startswith("_") or callable(getattr(kind, name, None))
    if kind.__module__ != "__main__" or (hidden and bool(new)) or str(name).startswith("_"):
        raise AttributeError(f"{kind.__name__!r} object has no attribute {name!r}")
    return setattr(target, name, new[0]) if new else getattr(target, name)


def _finished(coroutine: Any) -> Any:
    """The result of a coroutine of the tests that the code awaits, wherever it does."""
    import asyncio
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, coroutine).result()


def _take_over(mine: Any, theirs: Any) -> None:
    """What the code did to a container that it was given."""
    if type(mine) is not type(theirs):
        return
    if type(mine).__name__ == "ndarray":
        if mine.shape == theirs.shape:
            mine[...] = theirs
    elif isinstance(mine, deque):
        mine.clear()
        mine.extend(theirs)
    elif isinstance(mine, (list, bytearray)):
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
    """Raises `Outcome` unless every test holds, and there is one."""
    script = Script(tests)
    namespace: dict[str, Any] = {"__name__": "__main__", **script.names}
    imports, bound = imports_of(code)
    lent: set[str] = set()  # names that the code imports
    for statement in imports:
        imported: dict[str, Any] = {}
        try:
            exec(statement, imported)
        except Exception:
            continue
        imported.pop("__builtins__", None)
        imported = {
            name: value
            for name, value in imported.items()
            if name not in bound and not hasattr(builtins, name)
        }
        namespace |= imported
        lent |= set(imported)
    tree = script.tree
    namespace = modules_of(tree) | namespace
    # A built-in that the code redefines stays what it is here: `set`, `len` and `abs` belong to the
    # tests.
    named = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    used = named - set(namespace)
    wanted = {name for name in used if not hasattr(builtins, name)}
    imported_here = {alias.asname or alias.name for alias in ast.walk(tree) if isinstance(alias, ast.alias)}
    # Tests that name nothing but built-ins test the code's own version of one.
    about = set() if wanted - bound_in(tree) - imported_here else used & bound - wanted
    entry = entry_of(code) if script.wants_a_candidate else None
    given = judge.start(sorted(wanted | about | ({entry} if entry else set())))
    if len(redefined := sorted(about & set(given))) > 1:
        raise Outcome(
            "error", f"the code redefines several built-ins that the tests use: {', '.join(redefined)}"
        )
    namespace |= given
    try:
        script.run(namespace, given.get(entry) if entry else None)
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
    if not script.held:
        raise Outcome("untested", "the tests asserted nothing")
    if not given and not lent & named:
        raise Outcome("untested", "the tests use nothing that the program defines")


def entry_of(code: str) -> str | None:
    """The one function or class of the code that no other part uses; None if there are more."""
    try:
        tree = ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    parts = [
        node for node in tree.body if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))
    ]
    used = {(part.name, name.id) for part in parts for name in ast.walk(part) if isinstance(name, ast.Name)}
    alone = [part.name for part in parts if not any(by != part.name and of == part.name for by, of in used)]
    return alone[0] if len(alone) == 1 else None


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
