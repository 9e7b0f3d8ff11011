"""Before anybody pays for training: is this teacher worth learning from?

The teacher is the same model with the reference in its prompt. Measured is what it says (greedy
accuracy in each layout, with a wrong reference, with auxiliary contexts) and, on the student's own
answers, how far its distributions lie from the student's (nats per token). Without a grader only
the latter speaks: a teacher that copies its reference makes the reference likely, which proves
nothing.

Shapes: T tokens of a completion, H hidden size.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from unisd.backbone import Backbone
from unisd.data.prompts import PromptBuilder
from unisd.data.rows import Row
from unisd.data.thoughts import answer_of, completion_text
from unisd.evaluation.grading import Z95, Interval, wilson
from unisd.evaluation.likelihood import reference_nll
from unisd.kernels.attention import takes_packed
from unisd.losses.chunked import chunked_loss, token_logprobs
from unisd.losses.terms import LossInputs
from unisd.methods.divergence import DivergenceSpec
from unisd.models.tokens import eos_ids, mark_ends, pad_id
from unisd.rollout.engine import Completion, Sampling
from unisd.rollout.transformers_engine import generate
from unisd.scoring.passes import Job, Passes, PassLayout
from unisd.tasks.base import as_grade

LAYOUTS = ("append", "turn")
HEADROOM = 0.05  # least gain in accuracy that is worth a run
SIDE_ROWS = 12  # the two side questions (wrong reference, auxiliary contexts) are asked of so many rows
# where a grader speaks, distributions are compared on so many rows and first tokens
COMPARED_ROWS, COMPARED_TOKENS = 12, 128
NOTABLE = 0.05  # nats per token below which a teacher says what the student says


Asked = tuple[Sequence[Row], Sequence[list[int]]]  # rows, and the prompts that are put to the model for them


@dataclass(frozen=True)
class Limits:
    """How much a probe asks for."""

    max_new_tokens: int = 256  # of each completion
    contexts: int = 3  # most auxiliary contexts per row
    batch_size: int = 64


class Probe:
    """Measures one model on rows.

    Args:
        model, tokenizer: the student, untrained.
        rows: as in :mod:`unisd.data`.
        grade: `(row, completion) -> bool`, or None where there is no grader.
        prompts: builds the prompts (its layout is varied here).
        on_phase: called with a name and the number of rows before each part, and `on_rows(count)`
            as rows finish.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        rows: Sequence[Row],
        grade: Callable[[Row, str], Any] | None,
        prompts: PromptBuilder,
        *,
        limits: Limits = Limits(),
        on_phase: Callable[[str, int], None] = lambda name, count: None,
        on_rows: Callable[[int], None] = lambda count: None,
    ) -> None:
        self.model, self.tokenizer, self.rows, self.grade = model, tokenizer, list(rows), grade
        self.builders = {layout: replace(prompts, layout=layout) for layout in LAYOUTS}
        self.limits = limits
        self.on_phase, self.on_rows = on_phase, on_rows
        self.eos_ids = eos_ids(model, tokenizer)
        self.pad_id = pad_id(model, tokenizer)
        mark_ends(model, tokenizer)
        self.backbone = Backbone(model)
        self.packed = self.backbone.check(self.pad_id) and takes_packed(model.device)

    # -- what it says ------------------------------------------------------------------------------

    def answers(
        self, name: str, asked: Mapping[str, Asked]
    ) -> dict[str, tuple[list[Completion], dict[str, Any]]]:
        """Greedy completions and their figures, by question.

        All are written together: rows that end late share a batch.
        """
        prompts = [prompt for _, part in asked.values() for prompt in part]
        self.on_phase(name, len(prompts))
        start = time.perf_counter()
        written = iter(
            generate(
                self.model,
                prompts,
                Sampling(self.limits.max_new_tokens),
                eos_ids=self.eos_ids,
                pad_id=self.pad_id,
                batch_size=self.limits.batch_size,
                on_rows=self.on_rows,
            )
        )
        found = {key: list(islice(written, len(rows))) for key, (rows, _) in asked.items()}
        speed = sum(len(c.ids) for part in found.values() for c in part) / (time.perf_counter() - start)
        return {
            key: (part, {**self._figures(asked[key][0], part), "tokens_per_s": speed})
            for key, part in found.items()
        }

    def _figures(self, rows: Sequence[Row], completions: Sequence[Completion]) -> dict[str, Any]:
        figures: dict[str, Any] = {
            "n": len(rows),
            "mean_length": sum(len(completion.ids) for completion in completions) / len(completions),
            "lengths": [len(completion.ids) for completion in completions],
            "truncated": sum(completion.truncated for completion in completions),
        }
        if self.grade is not None:
            texts = [answer_of(completion_text(self.tokenizer, one.ids)) for one in completions]
            figures["correct"] = [
                int(as_grade(self.grade(row, text)).correct) for row, text in zip(rows, texts, strict=True)
            ]
            figures["accuracy"] = wilson(sum(figures["correct"]), len(rows))
        return figures

    # -- how far its distributions lie from the student's ------------------------------------------

    def states(self, prompts: Sequence[list[int]], completions: Sequence[Completion]) -> list[Tensor]:
        """Final hidden states `[T_i,H]` under each prompt, that predict the completion."""
        jobs = [
            Job("teacher", i, prompt, completion.ids)
            for i, (prompt, completion) in enumerate(zip(prompts, completions, strict=True))
        ]
        passes = Passes(self.backbone, PassLayout(self.packed, self.pad_id, token_budget=2048))
        size, device = self.backbone.head_module.in_features, self.model.device
        found = [torch.zeros(0, size, device=device) for _ in jobs]  # of empty completions
        with passes.under():
            for group in passes.hidden_states(jobs, device):
                for states in group:
                    found[states.job.row] = states.final_TH
        return found

    def divergence(
        self, teacher: Sequence[Tensor], student: Sequence[Tensor], completions: Sequence[Completion]
    ) -> float:
        """Mean KL(teacher || student) per token, in nats."""
        head, total, count = self.backbone.head(), 0.0, 0
        with torch.no_grad():
            for teacher_TH, student_TH, completion in zip(teacher, student, completions, strict=True):
                target_T = torch.tensor(completion.ids, device=student_TH.device)
                zero_T = torch.zeros(len(target_T), device=student_TH.device)
                output = chunked_loss(
                    LossInputs(student_TH, head, teacher_TH, head, target_T, DivergenceSpec(), zero_T)
                )
                total += float(output.divergence_N.sum())
                count += len(target_T)
        return total / max(count, 1)

    def spread(self, rows: Sequence[Row], completions: Sequence[Completion]) -> float | None:
        """Mean range of a token's log-probabilities over the auxiliary contexts, in nats.

        None without two contexts.
        """
        ranges = []
        for row, completion in zip(rows, completions, strict=True):
            contexts = self.builders["append"].auxiliary(row, self.limits.contexts)
            if len(contexts) < 2 or not completion.ids:
                continue
            target_T = torch.tensor(completion.ids, device=self.model.device)
            with torch.no_grad():
                states = self.states(contexts, [completion] * len(contexts))
                logp_KT = torch.stack(
                    [token_logprobs(hidden_TH, self.backbone.head(), target_T) for hidden_TH in states]
                )
            ranges.append((logp_KT.amax(0) - logp_KT.amin(0)).mean())
        return float(torch.stack(ranges).mean()) if ranges else None

    # -- the report --------------------------------------------------------------------------------

    def run(self) -> dict[str, Any]:
        """Measure all figures, and put the advice into plain words.

        Accuracies with 95 % intervals, divergences in nats per token.
        """
        rows = self.rows
        student_prompts = [self.builders["append"].student(row) for row in rows]
        teacher_prompts = {
            layout: [builder.teacher(row) for row in rows] for layout, builder in self.builders.items()
        }
        asked: dict[str, Asked] = {"student": (rows, student_prompts)}
        sides = self._side_rows("auxiliary_contexts")
        if self.grade is not None:
            asked |= {layout: (rows, prompts) for layout, prompts in teacher_prompts.items()}
            if sides:
                # One context per row, taken in turn: the accuracy of the typical context at the
                # price of one generation.
                views = [self.builders["append"].auxiliary(rows[i], self.limits.contexts) for i in sides]
                asked["auxiliary"] = (
                    [rows[i] for i in sides],
                    [view[n % len(view)] for n, view in enumerate(views)],
                )
        answered = self.answers("student's and teacher's answers", asked)
        completions, student = answered["student"]
        teacher: dict[str, dict[str, Any]] = {
            layout: answered[layout][1] if layout in answered else {"n": len(rows)} for layout in LAYOUTS
        }
        # Without a grader the advice rests on these, so that they get every row and token.
        compared = rows[:COMPARED_ROWS] if self.grade else rows
        own = [self._compared(completion) for completion in completions[: len(compared)]]
        self.on_phase("divergences on the student's answers", 3 * len(compared))
        start, scored = time.perf_counter(), 0
        states = {}
        for name, prompts in (("student", student_prompts), *teacher_prompts.items()):
            prompts = prompts[: len(compared)]
            states[name] = self.states(prompts, own)
            scored += sum(len(p) + len(c.ids) for p, c in zip(prompts, own, strict=True))
            self.on_rows(len(compared))
        score_speed = scored / (time.perf_counter() - start)
        for layout in LAYOUTS:
            teacher[layout]["divergence"] = self.divergence(states[layout], states["student"], own)
        if self.grade is None:
            student["nll"] = self._nll(None)
            for layout, prompts in teacher_prompts.items():
                # Copying, not knowledge: reported under that name and never used for advice.
                teacher[layout]["copying_nll"] = self._nll(prompts)
        best = max(LAYOUTS, key=lambda layout: self._merit(teacher[layout]))
        report: dict[str, Any] = {
            "n": len(rows),
            "n_compared": len(compared),
            "max_new_tokens": self.limits.max_new_tokens,
            "student": student,
            "teacher": teacher,
            "layout": best,
            "wrong_reference": self._wrong_reference(best, states[best], own),
            "auxiliary": self._auxiliary(sides, answered.get("auxiliary", ([], {"n": len(sides)}))[1], own),
            "score_tokens_per_s": score_speed,
        }
        report["advice"] = advice(report)
        return report

    def _nll(self, prompts: Sequence[list[int]] | None) -> float:
        """Of the references, in nats per token; None: under the rows' own prompts."""
        nll, tokens = reference_nll(self.model, self.tokenizer, list(self.rows), prompt_ids=prompts)
        return nll / max(tokens, 1)

    def _merit(self, figures: dict[str, Any]) -> float:
        if "accuracy" in figures:
            return float(figures["accuracy"]["value"])
        # Without a grader: the layout in which the reference moves the teacher further.
        return float(figures["divergence"])

    def _compared(self, completion: Completion) -> Completion:
        return completion if self.grade is None else replace(completion, ids=completion.ids[:COMPARED_TOKENS])

    def _side_rows(self, column: str) -> list[int]:
        """The first rows that have the column: each costs a whole generation."""
        return [i for i, row in enumerate(self.rows) if row.get(column)][:SIDE_ROWS]

    def _wrong_reference(
        self, layout: str, right: Sequence[Tensor], own: Sequence[Completion]
    ) -> dict[str, Any] | None:
        """Measure the teacher under a wrong reference, where rows have one.

        `own`: the student's answers of the compared rows, `right`: the teacher's states along them.
        """
        chosen = self._side_rows("negative_context")
        if not chosen:
            return None
        prompts = [self.builders[layout].negative(self.rows[i]) for i in chosen]
        figures: dict[str, Any] = {"n": len(chosen), "rows": chosen}
        if self.grade is not None:
            asked = {"wrong": ([self.rows[i] for i in chosen], prompts)}
            figures |= self.answers("teacher, wrong reference", asked)["wrong"][1]
        both = [(i, prompt) for i, prompt in zip(chosen, prompts, strict=True) if i < len(own)]
        answers = [own[i] for i, _ in both]
        wrong = self.states([prompt for _, prompt in both], answers)
        figures["divergence_from_right"] = self.divergence([right[i] for i, _ in both], wrong, answers)
        return figures

    def _auxiliary(
        self, chosen: list[int], figures: dict[str, Any], own: Sequence[Completion]
    ) -> dict[str, Any] | None:
        """Measure how far the contexts of the `chosen` rows lie apart.

        `figures`: of the answers under one of them.
        """
        if not chosen:
            return None
        both = [i for i in chosen if i < len(own)]
        if self.grade is not None:
            both = both[: COMPARED_ROWS // 2]  # every row is scored under each of its contexts
        return {**figures, "spread": self.spread([self.rows[i] for i in both], [own[i] for i in both])}


def teaches(report: dict[str, Any]) -> bool:
    """Whether there is something to learn from this teacher, by the best judge that there is."""
    student, teacher, wrong = (
        report["student"],
        report["teacher"][report["layout"]],
        report["wrong_reference"],
    )
    if "accuracy" in student:
        return bool(teacher["accuracy"]["value"] - student["accuracy"]["value"] >= HEADROOM)
    reads = wrong is None or wrong["divergence_from_right"] >= NOTABLE
    return bool(teacher["divergence"] >= NOTABLE and reads)


def advice(report: dict[str, Any]) -> str:
    """Say the figures in plain words: layout, headroom, whether agreement can weigh anything."""
    graded = "accuracy" in report["student"]
    cut, count = cut_answers(report)
    told = f"{cut} of {count} answers reached the limit: raise --eval_max_new_tokens."
    if graded and cut > 0.5 * count and not teaches(report):
        return f"Nothing can be said yet: {told}"
    judged = _by_accuracy(report) if graded else _by_divergence(report)
    lines = [*judged, *_of_wrong_reference(report), _of_contexts(report)]
    return " ".join([*lines, *([told] if cut > 0.1 * count else ())])


def cut_answers(report: dict[str, Any]) -> tuple[int, int]:
    """How many of the student's and the teacher's answers reached the limit, and of how many."""
    sides = [report["student"], report["teacher"][report["layout"]]]
    counted = [side["truncated"] for side in sides if "truncated" in side]
    return sum(counted), len(counted) * int(report["n"])


def gain(before: Sequence[int], after: Sequence[int]) -> Interval:
    """The difference of two shares of right answers to the same rows, with a 95 % interval.

    By the normal approximation, with half an answer added to each of the four kinds of pairs
    (Agresti and Min 2005), which holds for few rows too.
    """
    pairs = Counter(zip(before, after, strict=True))
    n, won, lost = len(before) + 2, pairs[0, 1] + 0.5, pairs[1, 0] + 0.5
    middle = (won - lost) / n
    half = Z95 * math.sqrt(won + lost - n * middle**2) / n
    value = (pairs[0, 1] - pairs[1, 0]) / max(1, len(before))
    return {"value": value, "low": middle - half, "high": middle + half}


def _by_accuracy(report: dict[str, Any]) -> list[str]:
    """Whether the teacher is right more often than the student."""
    sides = report["student"], report["teacher"][report["layout"]]
    student, teacher = (side["accuracy"]["value"] for side in sides)
    found = gain(*(side["correct"] for side in sides))
    shares = (
        f"with the reference in its prompt the model is right in {teacher:.0%}, without it in {student:.0%}"
    )
    more = f"with {report['n']} rows the difference is not certain: probe more rows (--max_train_rows)."
    if not teaches(report) and found["high"] < HEADROOM:
        return [
            f"Self-distillation cannot help here: {shares}. Try another prompt, better references or a larger"
            " model."
        ]
    if not teaches(report):
        return [f"No headroom is shown: {shares}; {more}"]
    lines = [
        f"Use teacher_prompt_layout={report['layout']}: the teacher is right in {teacher:.0%}, the"
        f" student in {student:.0%}: a headroom of {found['value'] * 100:.0f} points."
    ]
    return lines if found["low"] > 0 else [*lines, f"{more[0].upper()}{more[1:]}"]


def _by_divergence(report: dict[str, Any]) -> list[str]:
    """Whether the reference moves the teacher, and a wrong one elsewhere."""
    moves, wrong = report["teacher"][report["layout"]]["divergence"], report["wrong_reference"]
    apart = wrong["divergence_from_right"] if wrong else None
    if moves < NOTABLE:
        return [
            f"The reference hardly changes what the model says ({moves:.3f} nats per token):"
            " self-distillation has little to teach here."
        ]
    if apart is not None and apart < NOTABLE:
        return [
            f"The teacher moves ({moves:.2f} nats per token), but hardly depends on whether its"
            f" reference is right or wrong ({apart:.3f}): self-distillation would teach style, not content."
        ]
    return [
        f"Use teacher_prompt_layout={report['layout']}: the reference moves the teacher by {moves:.2f} nats"
        " per token"
        + (f", a wrong one by {apart:.2f} from there." if apart is not None else ".")
        + " Without a grader it is unknown whether it moves in the right direction: name one with --grader."
    ]


def _of_wrong_reference(report: dict[str, Any]) -> list[str]:
    wrong, teacher = report["wrong_reference"], report["teacher"][report["layout"]]
    if not wrong or "accuracy" not in wrong or "accuracy" not in teacher:
        return []
    fall = gain(wrong["correct"], [teacher["correct"][row] for row in wrong["rows"]])
    words = (
        "the quality of your references matters."
        if fall["low"] > 0
        else "it matters little how good your references are."
        if fall["high"] < 0.1
        else "not certain."
    )
    return [
        f"A wrong reference costs the teacher {fall['value'] * 100:.0f} points on {len(wrong['rows'])} rows:"
        f" {words}"
    ]


def _of_contexts(report: dict[str, Any]) -> str:
    auxiliary = report["auxiliary"]
    if auxiliary is None:
        return (
            "There are no auxiliary contexts: agreement cannot run on these rows as they are;"
            " --agreement_contexts retrieval builds them."
        )
    if auxiliary["spread"] is None or auxiliary["spread"] < NOTABLE:
        return "The auxiliary contexts hardly disagree: agreement has nothing to work with."
    return (
        f"The auxiliary contexts disagree by {auxiliary['spread']:.2f} nats per token: agreement has"
        " something to weigh."
    )
