"""Names the papers of what a run used, for its card: the recipe's, and those of its plug-ins.

A paper is what a recipe's description or a plug-in's docstring calls `arXiv 1234.56789`, so that a
method of yours is cited as soon as it says where it is from.
"""

from __future__ import annotations

import inspect
import re

from unisd import recipes
from unisd.config import UniSDConfig
from unisd.methods.registry import Named, parse_term, parse_weight
from unisd.methods.targets import parse_target

UNISD = "2605.06597"
_PAPER = re.compile(r"arXiv\s+(\d{4}\.\d{5})")


def papers(recipe: str, config: UniSDConfig) -> dict[str, str]:
    """The arXiv numbers of all that a run used, each with what it is the paper of."""
    used = [("UniSD", f"arXiv {UNISD}"), (f"recipe `{recipe}`", recipes.load(recipe).description)]
    used += [(f"weight `{one}`", _said_of(parse_weight(one))) for one in config.reliability_weights]
    used += [(f"target `{one}`", _said_of(parse_target(one))) for one in [config.target] if one]
    used += [(f"term `{one}`", _said_of(parse_term(one))) for one in config.terms]
    found: dict[str, str] = {}
    for what, text in used:
        for paper in _PAPER.findall(text):
            found.setdefault(paper, what)
    return found


def _said_of(plugin: Named) -> str:
    return inspect.getdoc(plugin.function) or ""
