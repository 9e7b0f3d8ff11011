"""What commands do, called from Python: rows prepared, and two models compared."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from unisd.config import UniSDConfig
from unisd.console import aligned, markdown_table
from unisd.data import contexts, rendering
from unisd.data.rows import Row, load_rows, prepare_rows
from unisd.errors import UserError
from unisd.evaluation.retention import as_base, check_base
from unisd.models.inference import opened
from unisd.run import measure
from unisd.run import prepare as preparing
from unisd.run.changes import HEAD, change_lines
from unisd.run.inputs import RunData
from unisd.run.options import RunOptions
from unisd.run.retention import load_sets

HEADER = ("", *HEAD[1:])


def prepare(
    rows: Any,
    args: UniSDConfig | None = None,
    *,
    agreement_contexts: str = "columns",
    negatives: str = "columns",
    embedder: str = "tfidf",
    model: Any = None,
    tokenizer: Any = None,
    grader: Callable[[Row, str], Any] | None = None,
) -> list[Row]:
    """Build auxiliary contexts and wrong references for rows, as `unisd prepare` does.

    Args:
        rows: as `load_rows` takes them.
        args: options of the training; only `num_auxiliary_contexts` and `seed` are used.
        agreement_contexts: `columns` (those in the rows), or built for all rows: `random` (other
            problems, solved), `retrieval` (the nearest) or `induction` (instructions that the model
            writes).
        negatives: wrong references for rows that have none: `columns` (build none), `corrupt` (the
            last number or letter changed) or `model` (written by it).
        embedder: for retrieval: `tfidf`, `model` (its mean hidden states) or the name of a
            sentence-transformers model.
        model: needed for texts that a model writes: its folder or hub id, or a loaded one.
        tokenizer: of a loaded one.
        grader: `(row, completion text) -> bool`, a share or a `Grade`: it proves that wrong
            references are wrong.

    Returns:
        The rows with `auxiliary_contexts` and `negative_context`. No context shows the row's own
        problem, a near-duplicate, or its reference.

    Raises:
        UserError: bad rows, an unknown kind, a single row, or a model that is needed and missing.
    """
    args = UniSDConfig() if args is None else args
    options = RunOptions(
        agreement_contexts=agreement_contexts,
        negatives=negatives,
        embedder=embedder,
        explicit=frozenset({"agreement_contexts"}),
    )
    options.check()
    if model is None and (contexts.needs_model(agreement_contexts, embedder) or negatives == "model"):
        what = "wrong references" if negatives == "model" else f"{agreement_contexts} contexts"
        raise UserError(f"{what} are made by a model: give model (and tokenizer, where it is loaded).")
    found = RunData("rows", _rows(rows), [])
    if grader is not None:
        found.grade = grader

    def load() -> tuple[Any, Any]:
        loaded = opened(model, tokenizer)
        rendering.set_options(loaded[1], args.chat_template_kwargs)
        return loaded

    return preparing.prepare(found, options, args, load)


class Comparison(dict[str, Any]):
    """The figures of a model before and after a change, as `results.json` has them.

    `acquisition`, `retention`, `drift` and `forgotten` say what has changed, `before` and `after`
    hold all figures, `answers` what `answers.json` holds. It prints as a table.
    """

    def __str__(self) -> str:
        lines = aligned(HEADER, change_lines(self))
        return "\n".join([*lines, *([self["forgotten"]] if self["forgotten"] else [])])

    def _repr_markdown_(self) -> str:
        """The same in a notebook."""
        lines = markdown_table(HEADER, change_lines(self))
        return "\n".join([*lines, "", self["forgotten"] or ""])


def compare(
    before: Any,
    after: Any,
    rows: Any,
    grader: Callable[[Row, str], Any] | None = None,
    *,
    retention: str | Sequence[str] | None = None,
    retention_rows: int | None = None,
    args: UniSDConfig | None = None,
    tokenizer: Any = None,
) -> Comparison:
    """Measure what a model learned and forgot, as `unisd train` does before and after.

    Args:
        before: the model as it was: its folder or hub id, or a loaded one; None: `after` without
            its adapter.
        after: the same of the model as it is now.
        rows: new problems, as `load_rows` takes them; training rows say little.
        grader: `(row, completion text) -> bool`, a share or a `Grade`; without one there is no
            accuracy.
        retention: what must not be lost: `none`, `general`, tasks or files, as `unisd train` takes
            them; None: `general`, and for the embedded model its own skills. Files are graded by
            `grader` too.
        retention_rows: maximum rows per such set.
        args: options of the training; only the limits of answers and batches are used.
        tokenizer: that of loaded models.

    Raises:
        UserError: bad rows, a model that cannot be opened, other vocabularies, an unknown retention
            set, a prompt that leaves no room for an answer.
    """
    args = UniSDConfig() if args is None else args
    data = RunData("rows", [], _rows(rows, needs_reference=False), grade=grader)
    asked = [retention] if isinstance(retention, str) else None if retention is None else list(retention)
    name = _name(after if before is None else before)
    options = RunOptions(retention=asked, retention_rows=retention_rows, model_name_or_path=name)
    options.check()
    data.retention = load_sets(options, None, grade=grader)
    new, of_new = _opened(after, tokenizer)
    old, of_old = (None, of_new) if before is None else _opened(before, tokenizer)
    if old is None or old is new or getattr(new, "get_base_model", lambda: None)() is old:
        if not hasattr(new, "disable_adapter"):
            raise UserError("before and after are one model without an adapter: give the one that it was.")
        old, of_old = None, of_new
    if of_old.get_vocab() != of_new.get_vocab():
        raise UserError("before and after have other vocabularies: give the model that it was adapted from.")
    for what, evaluated in data.evaluated.items():
        rendering.check_rows(of_new, evaluated, what)
    measure.check_lengths(new, of_new, data)
    check_base(new, old)
    with as_base(new, old) as bare:
        sides = measure.measure(bare, of_new, data, args)
    figures, answers = measure.measure(new, of_new, data, args)
    figures |= measure.drift_between(new, old, of_new, data, args, (answers, sides[1]))
    return Comparison(
        before=sides[0],
        after=figures,
        **measure.compared(data, {"figures": sides[0], "answers": sides[1]}, (figures, answers)),
        answers=measure.pair_answers(data, sides[1], answers),
    )


def _name(model: Any) -> str:
    return str(model if isinstance(model, (str, Path)) else getattr(model.config, "_name_or_path", ""))


def _opened(model: Any, tokenizer: Any) -> tuple[Any, Any]:
    """A model with its own tokenizer; a loaded one has the one that was given."""
    return opened(model, None if isinstance(model, (str, Path)) else tokenizer)


def _rows(rows: Any, needs_reference: bool = True) -> list[Row]:
    """Rows of a file as all commands read them; others were read before, and are checked."""
    if isinstance(rows, (str, Path)):
        return load_rows(rows, needs_reference=needs_reference)
    return prepare_rows(rows, needs_reference=needs_reference)
