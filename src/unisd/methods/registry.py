"""Functions known by name: from here, or from other packages by entry point; their options bound
from text.

What is registered (token weights, targets, loss terms) is a frozen object with the fields `name`,
`function` and `options`. A *reliability weight* is one function `(StepScores, **options) ->
weights`; it declares what it needs of the scoring phase, and only that is computed.
"""

from __future__ import annotations

import ast
import inspect
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from importlib.metadata import entry_points
from typing import Any, Protocol, TypeVar

from torch import Tensor

from unisd.errors import UserError, nearest
from unisd.methods.scores import NEEDS, NORMALIZERS, StepScores, TermInputs

logger = logging.getLogger(__name__)


class Named(Protocol):
    """What a registry holds."""

    @property
    def name(self) -> str: ...
    @property
    def function(self) -> Callable[..., Tensor]: ...


Plugin = TypeVar("Plugin", bound=Named)


def find(kind: str, name: str, registry: Mapping[str, Plugin], group: str) -> Plugin:
    """The plug-in registered as `name`, here or by an installed package under the entry point
    group.

    Raises:
        UserError: an unknown name, with the nearest known one; a package that cannot be loaded or
            registers nothing.
    """
    offered = [] if name in registry else list(entry_points(group=group))
    # a package may register under another name
    for entry in sorted(offered, key=lambda entry: entry.name != name):
        if name in registry:
            break
        try:
            entry.load()
        except Exception as error:  # whatever another package's import raises
            if entry.name == name:
                raise UserError(f"{kind} {name!r}: loading {entry.value} failed: {error!r}") from error
            logger.warning("%s %r could not be loaded from %s: %r", kind, entry.name, entry.value, error)
    if name in registry:
        return registry[name]
    for entry in offered:
        if entry.name == name:
            raise UserError(
                f"{kind} {name!r}: {entry.value} was loaded but registers no {kind} of that name."
            )
    names = sorted(registry.keys() | {entry.name for entry in offered})
    close = nearest(name, names, cutoff=0.0)
    hint = f" Did you mean {close!r}?" if close else ""
    raise UserError(f"unknown {kind} {name!r}.{hint} Known: {', '.join(names)}.")


def check_name(kind: str, name: Any) -> None:
    """Raise `UserError` for a name that no option could say, or a decorator without one."""
    if not isinstance(name, str):
        raise UserError(f'a {kind} is registered by a name: write it as in @register...("name").')
    if not name or ":" in name:
        raise UserError(f"{kind} {name!r}: a name has a character or more, and no colon.")


def enter(kind: str, plugin: Plugin, registry: dict[str, Plugin]) -> None:
    """Make a plug-in known by its name; raise `UserError` if another module has taken it."""
    known: Any = registry.get(plugin.name)
    # a reload replaces its own
    if known is not None and known.function.__module__ != plugin.function.__module__:
        raise UserError(f"{kind} {plugin.name!r} is already registered by {known.function.__module__}.")
    registry[plugin.name] = plugin


def bound_options(
    kind: str, name: str, function: Callable[..., Any], options: Mapping[str, Any]
) -> dict[str, Any]:
    """The options, after unknown and missing ones are refused: here, not in the first step.

    The first parameter is no option.
    """
    parameters = list(inspect.signature(function).parameters.values())[1:]
    accepted = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    unknown = [] if any(p.kind == p.VAR_KEYWORD for p in parameters) else sorted(set(options) - set(accepted))
    if unknown:
        listed = ", ".join(accepted) or "none"
        raise UserError(f"{kind} {name!r} has no option {unknown[0]!r} (accepted: {listed}).")
    missing = [
        p.name for p in parameters if p.name in accepted and p.default is p.empty and p.name not in options
    ]
    if missing:
        raise UserError(f"{kind} {name!r} needs a value for its option {missing[0]!r}.")
    return dict(options)


def all_options(function: Callable[..., Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """The options with the function's defaults for those that are not bound."""
    parameters = list(inspect.signature(function).parameters.values())[1:]
    return {p.name: p.default for p in parameters if p.default is not p.empty} | dict(options)


def names_of(given: str | Iterable[str]) -> frozenset[str]:
    """Several names, or a single one."""
    return frozenset([given] if isinstance(given, str) else given)


@contextmanager
def naming_what_is_missing(kind: str, name: str, inputs: Any, declared: str) -> Iterator[None]:
    """Say of a plug-in that reads what it has not asked for that it must declare it."""
    try:
        yield
    except (AttributeError, TypeError) as error:
        missing = [each.name for each in fields(inputs) if getattr(inputs, each.name) is None]
        if "None" not in str(error) or not missing:
            raise
        raise UserError(
            f"{kind} {name!r} failed ({error}): without being named in its {declared} these are None:"
            f" {', '.join(missing)}."
        ) from error


def parse(kind: str, text: str) -> tuple[str, dict[str, Any]]:
    """`name` or `name:option=value,option=value`; values are Python literals, or else strings."""
    name, _, tail = text.partition(":")
    options: dict[str, Any] = {}
    # a comma inside a list is not a separator
    for part in re.split(r",(?=\s*\w+\s*=)", tail) if tail.strip() else []:
        key, equals, value = part.partition("=")
        if not equals or not key.strip().isidentifier():
            raise UserError(f"{kind} {text!r}: expected option=value, got {part!r}.")
        try:
            options[key.strip()] = ast.literal_eval(value.strip())
        except (ValueError, SyntaxError):
            options[key.strip()] = value.strip()
    return name.strip(), options


KIND = "token weight"
ENTRY_POINT_GROUP = "unisd.token_weights"


Weight = TypeVar("Weight", bound=Callable[..., Tensor])


@dataclass(frozen=True)
class WeightFunction:
    """A registered reliability weight and its options; call it with the scores of a step."""

    name: str
    function: Callable[..., Tensor]
    level: str  # "token": weights [B,T]; "sequence": weights [B]
    needs: frozenset[str]  # subset of NEEDS
    # published divisor: "weights" (sum of b m) or "tokens" (sum of m); "mean1": b scaled to mean 1
    # per row
    normalizer: str
    options: Mapping[str, Any] = field(default_factory=dict)
    # looks at the student and at each row alone: called with a micro-batch, after its forward pass
    in_forward: bool = False

    def __call__(self, scores: StepScores) -> Tensor:
        with naming_what_is_missing(KIND, self.name, scores, "needs"):
            weights = self.function(scores, **self.options)
        expected = scores.mask.shape if self.level == "token" else scores.mask.shape[:1]
        if weights.shape != expected:
            raise UserError(
                f"token weight {self.name!r} is of level {self.level} and must return shape"
                f" {tuple(expected)}, but returned {tuple(weights.shape)}."
            )
        return weights

    def with_options(self, **options: Any) -> WeightFunction:
        """The same with options bound; unknown and missing ones are refused here, not in the first
        step.
        """
        return replace(
            self, options=bound_options(KIND, self.name, self.function, {**self.options, **options})
        )


_REGISTRY: dict[str, WeightFunction] = {}


def register_weight(
    name: str,
    *,
    level: str = "token",
    needs: frozenset[str] = frozenset(),
    normalizer: str = "weights",
    in_forward: bool = False,
) -> Callable[[Weight], Weight]:
    """Decorator: make a function `(scores, **options) -> Tensor` known as the reliability weight
    `name`.

    in_forward: the needs `student` and `divergence` are then met by the training pass, without a
    pass of their own. The function must treat each row separately, because it sees one micro-batch
    at a time, and leave each row some weight: rows are counted before.
    """
    check_name(KIND, name)
    if level not in ("token", "sequence"):
        raise UserError(f"token weight {name!r}: level must be token or sequence, got {level!r}.")
    if normalizer not in NORMALIZERS:
        raise UserError(
            f"token weight {name!r}: normalizer must be one of {', '.join(NORMALIZERS)}, got {normalizer!r}."
        )
    if in_forward and level != "token":
        raise UserError(f"token weight {name!r}: only weights of level token can be in_forward.")
    needs = names_of(needs)
    if unknown := sorted(needs - NEEDS):
        raise UserError(
            f"token weight {name!r} needs {unknown[0]!r}, which scoring does not offer: {sorted(NEEDS)}."
        )

    def register(function: Weight) -> Weight:
        weight = WeightFunction(name, function, level, needs, normalizer, in_forward=in_forward)
        enter(KIND, weight, _REGISTRY)
        return function

    return register


def get_weight(name: str) -> WeightFunction:
    """The reliability weight registered as `name`, here or by an installed package."""
    return find(KIND, name, _REGISTRY, ENTRY_POINT_GROUP)


def parse_weight(text: str) -> WeightFunction:
    """`name` or `name:option=value,option=value`; values are Python literals, or else strings."""
    name, options = parse(KIND, text)
    return get_weight(name).with_options(**options)


# -------------------------------------------------------------------------------------- loss terms

TERM_KIND = "loss term"
TERM_GROUP = "unisd.terms"
TERM_NEEDS = frozenset({"negative", "hidden"})


@dataclass(frozen=True)
class Term:
    """A registered term of the loss, its options and its coefficient; call it with values of
    tokens.
    """

    name: str
    function: Callable[..., Tensor]
    needs: frozenset[str]  # subset of TERM_NEEDS
    options: Mapping[str, Any] = field(default_factory=dict)
    coefficient: float = 1.0
    derivative: Callable[..., Tensor] | None = None  # of the function, by l; None: left to autograd

    def __call__(self, inputs: TermInputs) -> Tensor:
        with naming_what_is_missing(TERM_KIND, self.name, inputs, "needs"):
            values = self.function(inputs, **self.options)
        if values.shape != inputs.student_logp.shape:
            raise UserError(
                f"loss term {self.name!r} must return shape {tuple(inputs.student_logp.shape)}, but returned"
                f" {tuple(values.shape)}."
            )
        return values

    def with_options(self, coefficient: Any = 1.0, **options: Any) -> Term:
        """The same with options bound; unknown ones, and a coefficient that is no weight, are
        refused here.
        """
        if not isinstance(coefficient, int | float) or not coefficient > 0:
            raise UserError(
                f"loss term {self.name!r}: coefficient must be a number above 0, got {coefficient!r}."
            )
        bound = bound_options(TERM_KIND, self.name, self.function, {**self.options, **options})
        return replace(self, options=bound, coefficient=float(coefficient))


_TERMS: dict[str, Term] = {}


def register_term(
    name: str, *, needs: frozenset[str] = frozenset(), derivative: Callable[..., Tensor] | None = None
) -> Callable[[Weight], Weight]:
    """Decorator: make a function `(inputs, **options) -> Tensor` known as the loss term `name`.

    It is added to the loss: `coefficient` times the mean of its values over the rows that have what
    it needs. It is called for some of the step's tokens at a time, and treats each token
    separately.

    needs: `negative`, the scores under a wrong reference (one more forward pass); `hidden`, states
    of student and teacher, which the gradient then flows through.

    derivative: the values' derivative by the student's log-probability, `(inputs, **options) ->
    Tensor`. Without it autograd finds the same, in some tens of small kernels for each chunk.
    """
    check_name(TERM_KIND, name)
    needs = names_of(needs)
    if unknown := sorted(needs - TERM_NEEDS):
        raise UserError(
            f"loss term {name!r} needs {unknown[0]!r}, which is not offered: {sorted(TERM_NEEDS)}."
        )

    def register(function: Weight) -> Weight:
        enter(TERM_KIND, Term(name, function, needs, derivative=derivative), _TERMS)
        return function

    return register


def parse_term(text: str) -> Term:
    """`name:coefficient=...,option=value`, as for token weights; the coefficient is 1 unless
    given.
    """
    name, options = parse(TERM_KIND, text)
    return find(TERM_KIND, name, _TERMS, TERM_GROUP).with_options(**options)
