"""The tests as they are run: each assertion that holds is counted, and what nobody calls is called.

Tests are Python source: assertions, functions `test_*`, classes of `unittest.TestCase` or `Test*`,
HumanEval's `check(candidate)`. What asserts nothing must not count as a pass: an assertion about a
constant does not count, one that fails is not swallowed by a handler of the tests' own, and
`unittest.main(exit=False)` hides nothing, for the classes are run here.
"""

from __future__ import annotations

import ast
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

from .remote import Remote, number_of, of_the_tests, same

MAX_MESSAGE_TEXT = 300


class Outcome(Exception):
    """The verdict is out: its reason and detail."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail[:MAX_MESSAGE_TEXT]


class Script:
    """Tests, made ready to run. `held`: how many of their assertions have held so far."""

    def __init__(self, tests: str) -> None:
        try:
            self.tree = ast.parse(tests)
            names = {n.id for n in ast.walk(self.tree) if isinstance(n, ast.Name)}
            bound = {n.id for n in ast.walk(self.tree) if isinstance(n, ast.Name) and _stores(n)}
            self.functions = [n for n in self.tree.body if isinstance(n, _FUNCTIONS)]
            checks = [n for n in self.functions if n.name.startswith(("check", "test"))]
            self.wants_a_candidate = any(_candidate_only(n) for n in checks)
            for function in checks:
                _insert(function, "__entered__", ast.Constant(function.name))
            self.tree = ast.fix_missing_locations(_Counting("type" not in bound).visit(self.tree))
            self.compiled = compile(self.tree, "tests", "exec")
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            raise Outcome("error", f"the tests do not compile: {error}") from None
        self.held = 0
        self.entered: set[str] = set()
        self.names: dict[str, Callable[..., Any]] = {
            "__held__": self._hold,
            "__entered__": self.entered.add,
            "__unswallowed__": _unswallowed,
            "__same__": same,
            "__type__": _type,
        }
        if "pytest" not in sys.modules and ("pytest" in names or "pytest" in tests):
            sys.modules["pytest"] = _stand_in()

    def _hold(self, value: Any = None) -> Any:
        self.held += 1
        return value

    def run(self, namespace: dict[str, Any], candidate: Any) -> None:
        """Run the tests, then what they define and do not call; raises what fails."""
        if "unittest" in sys.modules or any(_imports(self.tree, "unittest")):
            import unittest

            unittest.main = lambda *args, **kwargs: None  # type: ignore[assignment]
        try:
            exec(self.compiled, namespace)
        except SystemExit as error:  # at the end of a main program
            if error.code:
                raise
        for name, value in list(namespace.items()):
            if name in self.entered:
                continue
            if isinstance(value, type) and value.__module__ == "__main__":
                self._run_class(value)
            elif name.startswith(("check", "test")) and any(name == f.name for f in self.functions):
                self._call(name, value, namespace, candidate)

    def _call(self, name: str, function: Any, namespace: dict[str, Any], candidate: Any) -> None:
        missing = _stand_in().required(function)
        if len(missing) == 1 and candidate is not None and _candidate_only(self._node(name)):
            _result(function(candidate))
            return
        if not name.startswith("test"):
            return
        for arguments in _stand_in().cases(function, namespace):
            if name in self.entered and not arguments:
                break
            absent = [each for each in missing if each not in arguments]
            if absent:
                raise Outcome("untested", f"{name} takes what nobody gives: {', '.join(absent)}")
            _result(function(**arguments))

    def _node(self, name: str) -> Any:
        return next(function for function in self.functions if function.name == name)

    def _run_class(self, kind: type) -> None:
        unittest = sys.modules.get("unittest")
        if unittest is not None and issubclass(kind, unittest.TestCase):
            result = _first_failure(unittest)
            unittest.defaultTestLoader.loadTestsFromTestCase(kind).run(result)
            if result.error is not None:
                raise result.error
        elif kind.__name__.startswith("Test") and not _stand_in().required(kind):
            for name in dir(kind):
                if name.startswith("test"):
                    case = kind()
                    getattr(case, "setup_method", lambda *_: None)(*_as_many(case))
                    for arguments in _stand_in().cases(getattr(kind, name), {}):
                        _result(getattr(case, name)(**arguments))


def _stand_in() -> Any:
    """Where it is needed: what it imports takes a while."""
    from . import pytest_stand_in

    return pytest_stand_in


_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def _stores(node: ast.Name) -> bool:
    return isinstance(node.ctx, ast.Store)


def _imports(tree: ast.AST, module: str) -> Iterator[bool]:
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            if any(name.partition(".")[0] == module for name in names):
                yield True


def _candidate_only(function: Any) -> bool:
    """Whether a test takes the function that it is about, as HumanEval's do."""
    given = function.args
    alone = len(given.args) - len(given.defaults) == 1 and not given.posonlyargs and not given.kwonlyargs
    return alone and (function.name.startswith("check") or given.args[0].arg == "candidate")


def _as_many(case: Any) -> list[Any]:
    """`setup_method` may take the method, or nothing."""
    return [None] * len(_stand_in().required(getattr(case, "setup_method", lambda: None)))


def _result(value: Any) -> None:
    """Wait for a test that is a coroutine."""
    if type(value) is types.CoroutineType:
        import asyncio

        asyncio.run(value)


def _first_failure(unittest: Any) -> Any:
    class Result(unittest.TestResult):  # type: ignore[misc]
        error: BaseException | None = None

        def addError(self, test: Any, error: Any) -> None:
            self.error = self.error or error[1]

        addFailure = addError

        def addSubTest(self, test: Any, subtest: Any, error: Any) -> None:
            if error is not None:
                self.addError(test, error)

        def addUnexpectedSuccess(self, test: Any) -> None:
            self.error = self.error or AssertionError("an unexpected success")

    return Result()


def _unswallowed() -> None:
    """In a handler of the tests': an assertion of theirs that failed stays failed."""
    error = sys.exc_info()[1]
    if error is not None and of_the_tests(error):
        raise error


def _type(value: Any) -> Any:
    if type(value) is Remote:
        return value._ask("type")
    if isinstance(value, (type, BaseException)) or number_of(value) is None:
        return type(value)
    return value.__dict__["_remote"]._ask("type")


# ---------------------------------------------------------------- counting


def _named(name: str, *args: ast.expr) -> ast.Call:
    return ast.Call(ast.Name(name, ast.Load()), list(args), [])


def _insert(function: Any, name: str, *args: ast.expr) -> None:
    """Call `name` first in a function, after its docstring."""
    at = 1 if ast.get_docstring(function, clean=False) is not None else 0
    function.body.insert(at, ast.Expr(_named(name, *args)))


def _always(test: ast.expr) -> bool:
    """Whether an assertion about this expression holds whatever the program does."""
    if isinstance(test, (ast.Tuple, ast.List, ast.Set)):
        return bool(test.elts)
    if isinstance(test, ast.Dict):
        return bool(test.keys)
    if isinstance(test, ast.BoolOp):
        some = [_always(value) for value in test.values]
        return any(some) if isinstance(test.op, ast.Or) else all(some)
    if isinstance(test, ast.UnaryOp):
        return isinstance(test.operand, ast.Constant)
    if isinstance(test, ast.NamedExpr):
        return _always(test.value)
    return isinstance(test, (ast.Constant, ast.Lambda, ast.GeneratorExp, ast.JoinedStr))


def _fails(body: list[ast.stmt]) -> bool:
    """Whether statements end in a failure: `raise`, `assert False`, `self.fail()`."""
    last = body[-1] if body else None
    if isinstance(last, ast.Assert):
        return isinstance(last.test, ast.Constant) and not last.test.value
    if isinstance(last, ast.Expr) and isinstance(last.value, ast.Call):
        return getattr(last.value.func, "attr", "") == "fail"
    return isinstance(last, ast.Raise)


class _Counting(ast.NodeTransformer):
    """Adds a count where an assertion has held, whatever its form."""

    def __init__(self, own_type: bool) -> None:
        self.own_type = own_type

    def visit_Assert(self, node: ast.Assert) -> Any:
        self.generic_visit(node)
        return node if _always(node.test) else [node, self._count(node)]

    def visit_If(self, node: ast.If) -> Any:
        raises = _fails(node.body) and not isinstance(node.test, ast.Constant)
        self.generic_visit(node)
        return [node, self._count(node)] if raises else node

    def visit_Try(self, node: ast.Try) -> Any:
        expected = _fails(node.body) or _fails(node.orelse)  # the exception is what is tested
        self.generic_visit(node)
        for handler in node.handlers:
            start: list[ast.stmt] = [ast.copy_location(ast.Expr(_named("__unswallowed__")), handler)]
            handler.body[:0] = start + ([self._count(handler)] if expected else [])
        return node

    def visit_Call(self, node: ast.Call) -> Any:
        called = node.func
        self.generic_visit(node)
        if self.own_type and isinstance(called, ast.Name) and called.id == "type" and len(node.args) == 1:
            called.id = "__type__"
        attribute = called.attr if isinstance(called, ast.Attribute) else ""
        if attribute.startswith("assert") or attribute == "raises":
            constant = attribute in ("assertTrue", "assert_") and node.args and _always(node.args[0])
            return node if constant else ast.copy_location(_named("__held__", node), node)
        return node

    def visit_Attribute(self, node: ast.Attribute) -> Any:
        self.generic_visit(node)
        if node.attr == "__class__" and isinstance(node.ctx, ast.Load):
            return ast.copy_location(_named("__type__", node.value), node)
        return node

    def visit_Compare(self, node: ast.Compare) -> Any:
        self.generic_visit(node)
        operator, right = node.ops[0], node.comparators[0]
        if (
            len(node.ops) > 1
            or not isinstance(operator, (ast.Is, ast.IsNot))
            or isinstance(right, ast.Constant)
        ):
            return node
        found: ast.expr = _named("__same__", node.left, right)
        if isinstance(operator, ast.IsNot):
            found = ast.UnaryOp(ast.Not(), found)
        return ast.copy_location(found, node)

    def _count(self, after: Any) -> ast.stmt:
        return ast.copy_location(ast.Expr(_named("__held__")), after)
