"""A variant of the pocket world in which the model doubts aloud.

So the loss of its doubt can be watched.

Asked plainly, it opens its answer with words of doubt; shown a solution, it doubts if the solution
does. A teacher that sees a reference without doubt is then sure of itself, and its student learns
to be so as well: what arXiv 2603.24472 found on real models. References that doubt
(`--reference_style hedged`) were meant as the control, but after this little training the model
hardly heeds a reference's doubt, and its student loses its own all the same. The base is not
shipped: `python -m experiments.pocket_base.pretrain --variant hedging` makes it.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from experiments.pocket_base.documents import Document, DocumentSampler
from experiments.pocket_base.messages import assistant
from unisd.pocket.skills import Problem
from unisd.pocket.task import hedged
from unisd.pocket.world import World


class HedgingSampler(DocumentSampler):
    """Draws the base's documents with doubt.

    It stands in every plain answer, and in half of the shown solutions and the answers to them.
    """

    def __init__(self, world: World, rng: random.Random, drills: float = 0.05) -> None:
        super().__init__(world, rng, drills)
        # whether a solution that this document shows doubts; None: it shows none
        self._shown: bool | None = None

    def sample(self) -> Document:
        self._shown = None
        document = super().sample()
        if document.kind.startswith("drill") or self._shown is False:
            return document
        *before, reply = document.messages
        return Document((*before, assistant(hedged(self.rng, reply["content"]))), document.kind)

    def _solution(self, problem: Problem, values: Sequence[str], own: float) -> str:
        if self._shown is None:
            self._shown = self.rng.random() < 0.5
        text = super()._solution(problem, values, own)
        return hedged(self.rng, text) if self._shown else text
