"""Which names of classes the tests use as such, not as a function that gives plain data."""

from __future__ import annotations

import ast
from collections.abc import Iterable

_PASS_ON = ("max", "min", "next", "sum", "abs", "list", "tuple", "sorted", "reversed", "iter", "deepcopy")


class Uses:
    """`classes`: names in whose objects the tests use attributes, items that they set, `with`, or
    which they compare or combine with another such object; or that stand where a class does.
    """

    def __init__(self, tree: ast.AST) -> None:
        self.made: dict[str, set[str]] = {}  # by variable or attribute: whose objects it may hold
        self.classes: set[str] = set()
        nodes = list(ast.walk(tree))
        for _ in range(2):  # a variable may be given on
            for node in nodes:
                self._bind(node)
        for node in nodes:
            self._use(node)

    def _bind(self, node: ast.AST) -> None:
        pairs: list[tuple[ast.AST, ast.AST | None]] = []
        if isinstance(node, ast.Assign):
            pairs = [(target, node.value) for target in node.targets]
        elif isinstance(node, (ast.AnnAssign, ast.AugAssign, ast.NamedExpr)):
            pairs = [(node.target, node.value)]
        elif isinstance(node, (ast.For, ast.AsyncFor, ast.comprehension)):
            pairs = [(node.target, node.iter)]
        elif isinstance(node, ast.withitem) and node.optional_vars is not None:
            pairs = [(node.optional_vars, node.context_expr)]
        for target, value in pairs:
            listed = isinstance(value, (ast.List, ast.Tuple, ast.ListComp, ast.Set))
            each = isinstance(node, (ast.For, ast.AsyncFor, ast.comprehension))
            several = listed and not each and isinstance(target, (ast.Name, ast.Attribute))
            for name in _names(target):
                found = self.made.setdefault(f"[{name}]" if several else name, set())
                found |= self.of(value, inside=True) if listed else self.of(value)
                if each:
                    found |= self.of(value, inside=True)

    def of(self, node: ast.AST | None, inside: bool = False) -> set[str]:
        """Whose objects an expression may give, or have in it."""
        if isinstance(node, (ast.Name, ast.Attribute)):
            name = node.id if isinstance(node, ast.Name) else node.attr
            return self.made.get(f"[{name}]" if inside else name, set())
        if isinstance(node, (ast.List, ast.Tuple, ast.Set)):
            return self._all(node.elts) if inside else set()
        if isinstance(node, (ast.ListComp, ast.GeneratorExp, ast.SetComp)):
            return self.of(node.elt) if inside else set()
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            if node.func.id in _PASS_ON:
                return self._all(node.args) | set().union(*(self.of(each, True) for each in node.args))
            return {node.func.id} if capital(node.func.id) and not inside else set()
        if isinstance(node, ast.Subscript):
            return self.of(node.value, True)
        if isinstance(node, ast.BinOp):
            return self.of(node.left, inside) | self.of(node.right, inside)
        if isinstance(node, ast.IfExp):
            return self.of(node.body, inside) | self.of(node.orelse, inside)
        if isinstance(node, ast.UnaryOp):
            return self.of(node.operand)
        return self.of(node.value, inside) if isinstance(node, (ast.Await, ast.NamedExpr)) else set()

    def _all(self, nodes: Iterable[ast.AST]) -> set[str]:
        return set().union(*(self.of(each) for each in nodes))

    def _use(self, node: ast.AST) -> None:
        if isinstance(node, ast.Attribute):
            self.classes |= self.of(node.value) | _capitals([node.value])
        elif isinstance(node, ast.Subscript):
            self.classes |= _capitals([node.value])
            if not isinstance(node.ctx, ast.Load):
                self.classes |= self.of(node.value)
        elif isinstance(node, ast.withitem):
            self.classes |= self.of(node.context_expr)
        elif isinstance(node, ast.ClassDef):
            self.classes |= _capitals(node.bases)
        elif isinstance(node, ast.Compare):
            self._beside(node.left, *node.comparators)
            if not any(isinstance(each, ast.Constant) for each in node.comparators):
                self.classes |= _capitals([node.left, *node.comparators])
        elif isinstance(node, ast.BinOp):
            self._beside(node.left, node.right)
        elif isinstance(node, ast.Call):
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            if name.startswith("assert"):
                self._beside(*node.args)
            if name in ("isinstance", "issubclass", "assertIsInstance", "__same__"):
                self.classes |= _capitals(node.args)

    def _beside(self, *nodes: ast.AST) -> None:
        found = [of for node in nodes if (of := self.of(node) | self.of(node, True))]
        if len(found) > 1:
            self.classes |= set().union(*found)


def capital(name: str) -> bool:
    return name.lstrip("_")[:1].isupper()


def _capitals(nodes: Iterable[ast.AST]) -> set[str]:
    listed = [part for node in nodes for part in (node.elts if isinstance(node, ast.Tuple) else [node])]
    return {node.id for node in listed if isinstance(node, ast.Name) and capital(node.id)}


def _names(target: ast.AST) -> list[str]:
    """The variables and attributes that an assignment sets."""
    stored = [each for each in ast.walk(target) if isinstance(getattr(each, "ctx", None), ast.Store)]
    return [
        each.id if isinstance(each, ast.Name) else each.attr
        for each in stored
        if isinstance(each, (ast.Name, ast.Attribute))
    ]
