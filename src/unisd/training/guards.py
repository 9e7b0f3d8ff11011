"""What keeps a long run from losing work: stopping on a signal, bad steps, and memory that runs
out.

All decisions are taken from values that are the same on every rank, so that no rank goes on alone.

Shapes: N loss tokens of a micro-batch.
"""

from __future__ import annotations

import math
import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from accelerate.utils import gather_object
from torch import Tensor
from transformers import TrainerCallback

from unisd.distributed.collectives import on_any_rank

Result = TypeVar("Result")


# ------------------------------------------------------------------------------------------ signals


class Interruption(TrainerCallback):  # type: ignore[misc]
    """Ctrl-C or SIGTERM (preemption): finish the step, save a checkpoint, stop.

    A second Ctrl-C stops at once.

    All ranks stop after the same step, whichever of them got the signal. A second SIGTERM changes
    nothing: schedulers and launchers both send one.
    """

    SAME_KEYPRESS = 1.0  # seconds; a launcher passes on what the terminal has sent to all of us

    def __init__(self) -> None:
        self.asked = False
        self._stops = False  # which all ranks have agreed on
        self._asked_at = -math.inf

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Handle both signals while active; add the callback to the trainer, too."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        self.asked = self._stops = False  # of an earlier training
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

        def ask(number: int, frame: Any) -> None:
            if self.asked:
                if number == signal.SIGINT and time.monotonic() - self._asked_at > self.SAME_KEYPRESS:
                    raise KeyboardInterrupt
                return
            self.asked, self._asked_at = True, time.monotonic()
            again = "; press Ctrl-C again to stop at once" if number == signal.SIGINT else " (terminated)"
            if os.environ.get("RANK", "0") == "0":
                print(f"\nstopping after this step, with a checkpoint{again}", flush=True)

        for number in before:
            signal.signal(number, ask)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.asked = on_any_rank(self.asked, args.world_size)
        self._stops = self.asked
        if self.asked:
            control.should_save = True
            control.should_training_stop = True
            control.should_evaluate = False  # whoever sent a SIGTERM waits for half a minute only

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Undo what transformers asks for where it takes a broken epoch for a whole one."""
        if self._stops:
            control.should_evaluate = control.should_save = False

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop after an evaluation, which a save follows (but where only the best is saved)."""
        self.asked = on_any_rank(self.asked, args.world_size)
        if self.asked and args.save_strategy != "best":
            control.should_save = control.should_training_stop = True


# ----------------------------------------------------------------------------------- non-finite
# loss and gradient


class FiniteGuard:
    """Finds steps whose loss or gradient is NaN or infinite, and the rows that did it.

    Args:
        limit: so many of them in a row stop the run.
        world_size: number of ranks.
    """

    def __init__(self, limit: int, world_size: int) -> None:
        self.limit = limit
        self.world_size = world_size
        self.skipped = 0  # steps of this run
        self.in_a_row = 0
        self.grad_norm: Tensor | float = 0.0
        self.message = ""
        # rows of the dataset [N] and a value [N] for each loss token
        self._seen: list[tuple[Tensor, Tensor]] = []

    def see(self, row_N: Tensor, *values_N: Tensor) -> None:
        """Keep what a micro-batch computed at its tokens until the step is over."""
        self._seen += [(row_N, value_N) for value_N in values_N]

    def is_bad(self, step: int, loss: Tensor | float) -> bool:
        """Judge the optimizer step number `step` before it is taken; `loss` is this rank's.

        The one wait for the device between the student's first pass and the optimizer.
        """
        device = loss.device if isinstance(loss, Tensor) else None
        both = [torch.as_tensor(x, dtype=torch.float32, device=device) for x in (self.grad_norm, loss)]
        grad_norm, own_loss = torch.stack(both).tolist()
        bad = not math.isfinite(grad_norm) or on_any_rank(not math.isfinite(own_loss), self.world_size)
        self.in_a_row = self.in_a_row + 1 if bad else 0
        if bad:
            self.skipped += 1
            self.message = self._diagnosis(step, math.isfinite(own_loss))
        self._seen = []
        return bad

    def _diagnosis(self, step: int, loss_is_finite: bool) -> str:
        culprits = {int(row) for row_N, value_N in self._seen for row in row_N[~value_N.isfinite()]}
        present = {row for row_N, _ in self._seen for row in row_N.tolist()}
        if self.world_size > 1:
            culprits = set().union(*gather_object([culprits]))
            present = set().union(*gather_object([present]))
        if culprits:
            return f"step {step}: the loss is not finite, because of {_listed(culprits)} of the training data"
        what = (
            "the loss is finite, but its gradient is not"
            if loss_is_finite
            else "the loss is not finite, though each token's divergence is: look at its weights and terms"
        )
        return f"step {step}: {what}; the step held {_listed(present)} of the training data"

    @property
    def too_many(self) -> str | None:
        """Why the run must stop, with the remedy; None while it may go on."""
        if self.in_a_row < self.limit:
            return None
        return (
            f"{self.in_a_row} steps in a row had a loss or gradient that is not finite and were skipped; the"
            f" last, {self.message}: look at these rows, lower learning_rate, or train in bf16 or float32;"
            " then resume from the checkpoint just saved."
        )


def _listed(rows: set[int], most: int = 16) -> str:
    shown = ", ".join(map(str, sorted(rows)[:most])) + (", ..." if len(rows) > most else "")
    return f"row{'s' if len(rows) != 1 else ''} {shown}"


def pieces_of(part: Sequence[int], size: int) -> list[list[int]]:
    """`part` cut into pieces of at most `size`."""
    return [list(part[first : first + size]) for first in range(0, len(part), size)]
