"""Measures what critics of self-distillation ask to be watched; the loss tells little of it.

- Suppressed uncertainty (arXiv 2603.24472, 2607.05184): `words/*` per 1,000 tokens,
  `words/style_loss_share`; the alarm is that doubt vanishes.
- Leak of the reference (arXiv 2607.02502, 2607.02234): `leak/*`; the alarm is that the gold answer
  is stated ever earlier.
- Collapse and forgetting (arXiv 2607.01763): `collapse/*`, `retained/nll`; the alarms are
  repetition, growth, and that the probe set is lost.

All but the leak probe and the probe set is counted on the step's own answers, without a forward
pass. :mod:`unisd.monitoring.alarms` judges the numbers. The word lists are files in `words/`, two
per language. Another file of words of doubt can take their place, or a folder with `hedges.txt` and
`style.txt`.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unisd.data.privilege import BUILT, MARK, final_answer, reference_at, wrong_twin
from unisd.data.prompts import PromptBuilder
from unisd.data.rows import Row
from unisd.errors import UserError
from unisd.methods.targets import jensen_shannon
from unisd.monitoring.alarms import NGRAM, pull_cosine
from unisd.rollout.engine import Completion
from unisd.scoring.passes import Job
from unisd.scoring.requests import ScoreRequest
from unisd.scoring.scorer import Scorer, teacher_head

FOLDER = Path(__file__).parent / "words"
PROBE_TOKENS = 32  # of a row, evenly spaced
PROBED = ("student", "teacher", "negative", "unconditioned", "full", "full_wrong", "base")
"""The distributions that are probed: the student's own, the teacher's, and the teacher's weights in
other contexts (`base`: in the student's).
"""


def load_words(kind: str, name: str) -> dict[str, str]:
    """Every form of every word or phrase -> the first form of its line.

    `name`: a language (`en`, `de`), a file, or a folder.

    Raises:
        UserError: no such language or file.
    """
    path = FOLDER / f"{kind}-{name}.txt"
    if not path.is_file():
        path = Path(name) / f"{kind}.txt" if Path(name).is_dir() else Path(name)
    if not path.is_file():
        known = ", ".join(sorted(p.stem.partition("-")[2] for p in FOLDER.glob("hedges-*.txt")))
        raise UserError(
            f"diagnostics_words={name!r} is neither a language ({known}) nor a file of words, one per line."
        )
    forms: dict[str, str] = {}
    for line in path.read_text(encoding="utf-8").lower().splitlines():
        found = [" ".join(form.split()) for form in line.split(",") if form.strip()]
        if found and not line.startswith("#"):
            forms |= dict.fromkeys(found, found[0])
    return forms


def repeated_share(ids: Sequence[int]) -> float:
    """Share of an answer's n-grams (`NGRAM`) that occurred in it before; 0 for shorter answers."""
    grams = [tuple(ids[i : i + NGRAM]) for i in range(len(ids) - NGRAM + 1)]
    return 1.0 - len(set(grams)) / len(grams) if grams else 0.0


def first_place(text: str, answer: str) -> float | None:
    """Where the answer is first stated: the share of the text's words before it.

    None where it is not.

    A letter is an answer only where it is marked as one: "A magnet" states nothing.
    """
    mark = MARK + r"\(?" if len(answer) == 1 and answer.isalpha() else r"(?<!\w)"
    found = re.search(rf"{mark}({re.escape(answer)})(?!\w)", text)
    return (
        None
        if found is None
        else len(re.findall(r"\S\s", text[: found.start(1)])) / max(len(text.split()), 1)
    )


def answer_tokens(tokenizer: Any, ids: Sequence[int]) -> list[bool]:
    """Which tokens of an answer are its final answer: the last place it is stated.

    See :func:`unisd.data.privilege.final_answer`.
    """
    text = tokenizer.decode(ids, skip_special_tokens=True)
    final = final_answer(text)
    if final is None:
        return [False] * len(ids)
    start, place, flags = text.rfind(final), 0, []
    for piece in tokenizer.batch_decode([[i] for i in ids], skip_special_tokens=True):
        found = text.find(piece.strip(), place)  # a token decoded alone may lose its space
        place = max(place, found + len(piece.strip()))
        flags.append(
            bool(piece.strip()) and 0 <= found < start + len(final) and found + len(piece.strip()) > start
        )
    return flags


@dataclass
class Answers:
    """Counts over answers, which add up over ranks."""

    tokens: int = 0
    answers: int = 0
    style: int = 0
    repeated: float = 0.0
    with_form: int = 0
    gradable: int = 0
    stated: int = 0
    place: float = 0.0
    words: Counter[str] = field(default_factory=Counter)

    def __add__(self, other: Answers) -> Answers:
        return Answers(**{name: getattr(self, name) + getattr(other, name) for name in vars(self)})

    def metrics(self, hedges: Sequence[str]) -> dict[str, float]:
        """Rates; those without a denominator are left out."""
        tokens, answers = max(self.tokens, 1), max(self.answers, 1)
        values = {f"words/{word}": 1000 * self.words[word] / tokens for word in hedges}
        values |= {
            "words/all": 1000 * sum(self.words.values()) / tokens,
            "collapse/repeated_share": self.repeated / answers,
            "collapse/style_token_share": self.style / tokens,
            "collapse/form_share": self.with_form / answers,
        }
        # What alarms add up over several steps.
        values |= {"counted/doubt": float(sum(self.words.values())), "counted/tokens": float(self.tokens)}
        values |= (
            {"counted/stated": float(self.stated), "counted/places": self.place} if self.gradable else {}
        )
        if self.gradable:
            values["leak/gold_stated_share"] = self.stated / self.gradable
        if self.stated:
            values["leak/gold_first_place"] = self.place / self.stated
        return values


class Counting:
    """Counts what answers are made of.

    Args:
        tokenizer: decodes them.
        words: language or file of the words of doubt.
    """

    def __init__(self, tokenizer: Any, words: str) -> None:
        self.tokenizer = tokenizer
        self.forms = load_words("hedges", words)
        self.hedges = sorted(set(self.forms.values()))
        own_style = (FOLDER / f"style-{words}.txt").is_file() or (Path(words) / "style.txt").is_file()
        self._style_words = load_words("style", words if own_style else "en")
        letter = r"[^\W\d_]"
        longest_first = "|".join(map(re.escape, sorted(self.forms, key=len, reverse=True))) or r"(?!)"
        self._doubt = re.compile(rf"(?<!{letter})(?:{longest_first})(?!{letter})")
        # of the tokens met so far: decoding a large vocabulary would take seconds
        self._style: dict[int, bool] = {}

    def style(self, ids: Sequence[int]) -> list[bool]:
        """Which tokens have no letter or digit, or are a word of style."""
        for i in set(ids) - self._style.keys():
            text = self.tokenizer.decode([i])
            self._style[i] = not any(c.isalnum() for c in text) or text.strip().lower() in self._style_words
        return [self._style[i] for i in ids]

    def count(self, rows: Sequence[Row], completions: Sequence[Sequence[int]]) -> Answers:
        """Counts of one answer per row."""
        total = Answers()
        for row, ids in zip(rows, completions, strict=True):
            text = self.tokenizer.decode(ids, skip_special_tokens=True)
            found = Counter(self.forms[word] for word in self._doubt.findall(" ".join(text.lower().split())))
            gold = reference_at(row, "answer")
            place = first_place(text, gold.removeprefix("Answer: ")) if gold else None
            total += Answers(
                tokens=len(ids),
                answers=1,
                style=sum(self.style(ids)),
                repeated=repeated_share(ids),
                with_form=int(final_answer(text) is not None),
                gradable=int(gold is not None),
                stated=int(place is not None),
                place=place or 0.0,
                words=found,
            )
        return total


def means(steps: Sequence[dict[str, float]]) -> dict[str, float]:
    """Mean of each metric over the steps that have it."""
    names = {name for step in steps for name in step}
    return {
        name: sum(found) / len(found)
        for name in names
        if (found := [step[name] for step in steps if name in step])
    }


@torch.no_grad()
def leak_numbers(
    student_TV: Tensor,
    teacher_TV: Tensor,
    wrong_TV: Tensor | None = None,
    unconditioned_TV: Tensor | None = None,
    base_TV: Tensor | None = None,
) -> dict[str, float]:
    """Measure how much of the teacher's signal is the reference itself.

    From log-probabilities `[T,V]` at the same tokens.

    `leak/wrong_jsd`: JSD (nats) of the teacher and the teacher under a wrong answer.
    `leak/shift_cosine`, `leak/shift_ratio`: with s = log q - log p and s_ref = log q_ref - log p,
    both centred over the vocabulary and q_ref the teacher without the question: their cosine and
    |s_ref| / |s|, means over tokens. Near 1, the reference alone would say the same.
    `retained/kl_to_base`: KL(p || base).
    """
    found: dict[str, float] = {}
    if wrong_TV is not None:
        found["leak/wrong_jsd"] = float(jensen_shannon(teacher_TV, wrong_TV).mean())
    if unconditioned_TV is not None:
        shift_TV, reference_TV = teacher_TV - student_TV, unconditioned_TV - student_TV
        shift_TV, reference_TV = (
            shift_TV - shift_TV.mean(-1, keepdim=True),
            reference_TV - reference_TV.mean(-1, keepdim=True),
        )
        found["leak/shift_cosine"] = float(torch.cosine_similarity(shift_TV, reference_TV, dim=-1).mean())
        found["leak/shift_ratio"] = float(
            (reference_TV.norm(dim=-1) / shift_TV.norm(dim=-1).clamp(min=1e-12)).mean()
        )
    if base_TV is not None:
        found["retained/kl_to_base"] = float((student_TV.exp() * (student_TV - base_TV)).sum(-1).mean())
    return found


def answers_to_keep(
    rows: Sequence[Row],
    write: Callable[[Sequence[Row]], Sequence[Completion]],
    tokenizer: Any,
    file: Path,
    *,
    resumed: bool,
    is_writer: bool = True,
) -> list[Row]:
    """The probe set: each prompt with the untrained model's own greedy answer.

    Training should leave it likely. The reference would not do: it is in another's style, and any
    method drifts from that. A resumed run reads the answers from `file`.
    """
    if resumed and file.is_file():
        kept: list[Row] = json.loads(file.read_text(encoding="utf-8"))
        return kept
    texts = [tokenizer.decode(completion.ids, skip_special_tokens=True) for completion in write(rows)]
    found = [{"prompt": row["prompt"], "completion": text} for row, text in zip(rows, texts, strict=True)]
    if is_writer:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(found), encoding="utf-8")
    return found


def probe_leak(
    scorer: Scorer,
    prompts: PromptBuilder,
    rows: Sequence[tuple[Row, ScoreRequest]],
    device: torch.device | str,
) -> dict[str, float]:
    """Average :func:`leak_numbers` over the answers of the step that have them.

    Costs up to seven passes over these rows.

    The other teachers are told as much as the run's own (`prompts.level`): of a wrong reference, or
    without the question.

    `leak/wrong_cosine` is taken over all probed tokens at once: the cosine of q - p and q_wrong -
    p, in probabilities. It is the part of the teacher's pull that does not depend on what the
    reference says: 1 where it would pull just so under a wrong one, 0 or less where what it says is
    what counts. A model that changes its style for any reference has a high one, so where the run's
    own teacher is told less than the whole reference, `leak/full_wrong_cosine` is that of teachers
    who are told all. Of a few answers both are noisy; the sums that they are made of are
    `leak/pull_*`, for those who add up.
    """
    requests = [request for _, request in rows]
    contexts = [probe_contexts(prompts, row, request) for row, request in rows]
    found: list[dict[str, float]] = []
    pulls = {told: torch.zeros(3, dtype=torch.float64) for told in ("", "full_")}
    answers = 0
    for views in distributions(scorer, requests, contexts, device):
        p, q, wrong_q, reference_q, full, full_wrong, base = map(views.get, PROBED)
        if p is None or q is None:  # an empty answer
            continue
        found.append(leak_numbers(p, q, wrong_q, reference_q, base))
        if wrong_q is not None:
            pulls[""] += pull_products(p, q, wrong_q)
            answers += 1
        if full is not None and full_wrong is not None:
            pulls["full_"] += pull_products(p, full, full_wrong)
    values = means(found)
    for told, sums in pulls.items():
        both, right, of_wrong = sums.tolist()
        if right > 0 and of_wrong > 0:
            values[f"leak/{told}wrong_cosine"] = pull_cosine(both, right, of_wrong)
            values |= {
                f"leak/pull_{told}both": both,
                f"leak/pull_{told}right": right,
                f"leak/pull_{told}wrong": of_wrong,
            }
            values["leak/pull_answers"] = float(answers)
    return values


def probe_contexts(prompts: PromptBuilder, row: Row, request: ScoreRequest) -> dict[str, list[int]]:
    """The prompts of an answer's probe, by `PROBED`, without those that the row cannot serve."""
    level = prompts.level
    wrong = None if level in ("plain", *BUILT) else wrong_twin(row)
    contexts = {
        "student": request.student,
        "teacher": request.teacher,
        "negative": None if wrong is None else prompts.at_level(wrong, level),
        "unconditioned": prompts.at_level(row, level, question=False),
        "base": request.student,
    }
    if wrong is not None and level != "full":
        contexts |= {"full": prompts.at_level(row, "full"), "full_wrong": prompts.at_level(wrong, "full")}
    return {name: ids for name, ids in contexts.items() if ids is not None}


def distributions(
    scorer: Scorer,
    requests: Sequence[ScoreRequest],
    contexts: Sequence[dict[str, list[int]]],
    device: torch.device | str,
    most_tokens: int = PROBE_TOKENS,
) -> Iterator[dict[str, Tensor]]:
    """Row by row the log-probabilities `[t,V]` of its answer's tokens in each context.

    At most `most_tokens` evenly spaced tokens of each answer; `base` with a fixed teacher only.
    These passes serve nothing else. One row's distributions are held at a time.
    """
    passes, teacher = scorer.passes, scorer.weights["teacher"]
    hidden: list[dict[str, Tensor]] = [{} for _ in requests]

    def read(*names: str) -> None:
        jobs = [
            Job(name, i, contexts[i][name], request.completion)
            for name in names
            for i, request in enumerate(requests)
            if name in contexts[i]
        ]
        for group in passes.hidden_states(jobs, device, Counter()):
            for states in group:
                length = len(states.final_TH)
                places = torch.linspace(0, length - 1, min(length, most_tokens), device=device)
                hidden[states.job.row][states.job.view] = states.final_TH[places.round().long()]

    with passes.under(teacher):
        read(*(name for name in PROBED if name != "student" and (name != "base" or teacher.kind == "base")))
    with passes.under():
        read("student")
        heads = {"student": passes.backbone.head()}
        other = teacher_head(passes.backbone, teacher)
    for states_of_row in hidden:
        with torch.no_grad(), passes.autocast():
            found = {
                name: heads.get(name, other).log_probs(states, scorer.spec.temperature)
                for name, states in states_of_row.items()
            }
        yield found


def pull_products(student_TV: Tensor, teacher_TV: Tensor, wrong_TV: Tensor) -> Tensor:
    """Sum (q - p)(q_wrong - p), (q - p)^2, (q_wrong - p)^2 over tokens; from logs `[T,V]`."""
    p = student_TV.exp()
    right, wrong = teacher_TV.exp() - p, wrong_TV.exp() - p
    return torch.stack([(right * wrong).sum(), right.square().sum(), wrong.square().sum()]).double().cpu()
