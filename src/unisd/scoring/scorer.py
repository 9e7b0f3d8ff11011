"""The phase without gradient: every view of a whole optimizer step, in one sweep (Algorithm 1, line
2).

All views of all rows are laid out to a token budget (by length, or with what they begin with read
once) under one switch of the teacher's weights. Kept are the primary
teacher's hidden states (not logits: at 7B they are 42 times smaller) and one number per token for
every other view.

Shapes: B rows of the step on this rank, T longest completion, K auxiliary contexts, N tokens of a
forward pass, H hidden size.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from unisd.backbone import Backbone, Captured
from unisd.batching import Batch, collate, forward_batches
from unisd.distributed.sharding import in_step
from unisd.kernels.lora import inference
from unisd.losses.chunked import chunked_loss, token_logprobs, token_scores
from unisd.losses.head import Head
from unisd.losses.terms import LossInputs, LossOutput, TargetStates
from unisd.methods.divergence import DivergenceSpec, log_probs
from unisd.methods.scores import StepScores
from unisd.methods.targets import Target
from unisd.scoring.prefix_sharing import collate_shared, shared_batches
from unisd.teacher import Teacher

SHARED_FROM = 64  # tokens of a prompt; below, the smaller passes cost more than they save
NEGATIVE = "teacher/negative"


@dataclass(frozen=True)
class ScoreRequest:
    """One completion and the prompts it is scored under."""

    completion: list[int]
    loss_mask: list[bool]
    student: list[int]
    teacher: list[int]
    negative: list[int] | None = None
    auxiliary: list[list[int]] = field(default_factory=list)
    number: int = -1  # of the row in the dataset, for messages
    sources: dict[str, list[int]] = field(default_factory=dict)
    """The prompts of the target's further sources, by their names; those that the row lacks are
    left out.
    """


@dataclass
class TeacherStates:
    """What the student is compared with: per row the teacher's final hidden states `[T_i,H]`, and
    those of listed layers.
    """

    final: list[Tensor]
    layers: dict[int, list[Tensor]]
    # of the target: final hidden states [T_i,H]
    sources: dict[str, list[Tensor]] = field(default_factory=dict)
    source_logp: dict[str, Tensor] = field(default_factory=dict)  # or realised log-probabilities [B,T]
    source_present: dict[str, Tensor] = field(default_factory=dict)  # [B] bool

    def of_target(
        self, hidden: Callable[[Sequence[Tensor]], Tensor], scalar: Callable[[Tensor], Tensor], length: int
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Per source its states `[N,H]` or log-probabilities `[N]`, and which tokens have all
        sources, by two ways to select.
        """
        values = {name: hidden(of_rows) for name, of_rows in self.sources.items()}
        values |= {name: scalar(logp_BT) for name, logp_BT in self.source_logp.items()}
        present_B = torch.ones(len(self.final), dtype=torch.bool)
        for of_rows_B in self.source_present.values():
            present_B &= of_rows_B
        return values, scalar(present_B[:, None].expand(-1, length))


@dataclass(frozen=True)
class _Job:
    """One sequence to score: which view, of which row."""

    view: str  # primary, negative, auxiliary or student; untempered: the primary at temperature 1
    row: int
    context: int  # number of the auxiliary context
    prompt: list[int]


@dataclass(frozen=True)
class _View:
    """What a forward pass left of one job: the states that predict the completion, final `[T_i,H]`
    and of listed layers.
    """

    job: _Job
    final_TH: Tensor
    layers_TH: dict[int, Tensor]


class Scorer:
    """Scores completions under teacher views.

    Args:
        backbone: the model, shared by student and teacher.
        teacher: its other weights.
        spec: divergence (its temperature applies to all views but the auxiliary ones).
        needs: what the active reliability weights and clips look at, of `mechanisms.NEEDS`.
        packed: rows end to end, or padded.
        token_budget: most tokens per forward pass.
        layers: further layers to keep of the primary teacher.
        share_prompts: read a prompt once for all of its generations, where that saves enough.
        share_prefixes: read what prompts begin with once for all that lie in a pass (packed then,
            as `prefixes.can_share` allows).
        autocast: makes the context of a forward pass (mixed precision as in training).
        choose_rows: agreement's budget: `[B]` mean teacher entropies -> `[B]` bool, the rows whose
            auxiliary views are scored; None: all. The others count as rows without contexts.
        target: what takes the place of the teacher's distribution; None: nothing does.
        sources: of the target's sources those that need a pass of their own.
        others: the weights that sources name beside the teacher's (base, step).
    """

    def __init__(
        self,
        backbone: Backbone,
        teacher: Teacher,
        spec: DivergenceSpec,
        *,
        needs: frozenset[str],
        packed: bool,
        token_budget: int,
        pad_id: int,
        layers: Sequence[int] = (),
        autocast: Any = None,
        share_prompts: bool = False,
        share_prefixes: bool = False,
        choose_rows: Callable[[Tensor], Tensor] | None = None,
        target: Target | None = None,
        sources: Sequence[str] = (),
        others: Mapping[str, Teacher] | None = None,
    ) -> None:
        self.share_prompts = share_prompts
        self.share_prefixes = share_prefixes
        self.choose_rows = choose_rows
        self.target = target
        self.sources = tuple(sources)
        self.others = dict(others or {})
        self.progress = 0.0  # of the run, for targets with a schedule
        # adapters into a copy of the weights for all passes; else anew in each pass, without the
        # copy
        self.merge_once = False
        self.backbone = backbone
        self.teacher = teacher
        self.spec = spec
        self.needs = needs
        self.packed = packed
        self.token_budget = token_budget
        self.pad_id = pad_id
        self.layers = tuple(layers)
        self.tokens: Counter[str] = Counter()  # read for training so far, by view
        self._autocast = autocast

    def _context(self) -> AbstractContextManager[Any]:
        return self._autocast() if self._autocast is not None else torch.autocast("cpu", enabled=False)

    def target_states(self, states: Mapping[str, Tensor], present_N: Tensor) -> TargetStates | None:
        """The target as the losses take it, with the heads of its sources."""
        return (
            None
            if self.target is None
            else TargetStates(self.target, states, self._heads(), present_N, self.progress)
        )

    def _heads(self) -> dict[str, Head]:
        """Of the target's sources."""
        return {
            name: teacher_head(self.backbone, self.others.get(name.partition("/")[0], self.teacher))
            for name in self.sources
        }

    def _source_jobs(
        self, rows: Sequence[ScoreRequest], states: TeacherStates, zeros: Tensor, device: Any
    ) -> list[_Job]:
        """What the target's sources need scored, with room for the results; a wrong reference is
        the negative view already.
        """
        jobs: list[_Job] = []
        size = self.backbone.head_module.in_features
        for name in self.sources:
            prompts = [row.negative if name == NEGATIVE else row.sources.get(name) for row in rows]
            states.source_present[name] = torch.tensor([prompt is not None for prompt in prompts])
            if self.target is not None and self.target.realised and self.spec.mode == "sampled":
                states.source_logp[name] = zeros.clone()
            else:
                states.sources[name] = [torch.zeros(len(row.completion), size, device=device) for row in rows]
            jobs += [
                _Job(name, i, 0, prompt)
                for i, prompt in enumerate(prompts)
                if prompt is not None and name != NEGATIVE
            ]
        return jobs

    def score(
        self, rows: Sequence[ScoreRequest], device: torch.device | str
    ) -> tuple[StepScores, TeacherStates]:
        """All views of all rows.

        The returned scores live on the CPU, the hidden states on `device`.
        """
        self._heads()  # of a sharded model they are gathered now, while all ranks are here
        B = len(rows)
        T = max((len(row.completion) for row in rows), default=0)
        K = max((len(row.auxiliary) for row in rows), default=0)
        zeros = torch.zeros(B, T)
        mask, tokens = zeros.bool(), zeros.long()
        for i, row in enumerate(rows):
            mask[i, : len(row.loss_mask)] = torch.tensor(row.loss_mask, dtype=torch.bool)
            tokens[i, : len(row.completion)] = torch.tensor(row.completion, dtype=torch.long)
        teacher_logp, untempered_logp, negative_logp, entropy = (zeros.clone() for _ in range(4))
        auxiliary_logp = torch.zeros(K, B, T)
        states = TeacherStates([zeros] * B, {layer: [zeros] * B for layer in self.layers})
        jobs = [_Job("primary", i, 0, row.teacher) for i, row in enumerate(rows)]
        if self.spec.mode == "nll":  # no teacher: the shapes stay, nothing is scored
            size = self.backbone.head_module.in_features
            states.final, jobs = [torch.zeros(len(row.completion), size, device=device) for row in rows], []
        if "negative" in self.needs:
            jobs += [
                _Job("negative", i, 0, row.negative) for i, row in enumerate(rows) if row.negative is not None
            ]
        sources = self._source_jobs(rows, states, zeros, device)
        jobs += [job for job in sources if job.view.startswith("teacher/")]
        negative_states: dict[int, Tensor] = {}  # by row, for the contrast of whole distributions
        auxiliary = [
            _Job("auxiliary", i, k, prompt)
            for i, row in enumerate(rows)
            for k, prompt in enumerate(row.auxiliary)
        ]
        if "auxiliary" in self.needs and self.choose_rows is None:
            jobs += auxiliary
        auxiliary_present = torch.tensor(
            [[k < len(row.auxiliary) for row in rows] for k in range(K)], dtype=torch.bool
        )
        auxiliary_present = auxiliary_present.reshape(K, B)

        def record(jobs: Sequence[_Job]) -> None:
            found: list[tuple[_Job, int, Tensor]] = []
            for group in self._hidden_states(jobs, rows, device):
                for view in group:
                    job, name = view.job, NEGATIVE if view.job.view == "negative" else view.job.view
                    if name in states.sources:
                        states.sources[name][job.row] = view.final_TH
                    if name == NEGATIVE and "contrast" in self.needs:
                        negative_states[job.row] = view.final_TH
                    if job.view == "primary":
                        states.final[job.row] = view.final_TH
                        for layer, hidden_TH in view.layers_TH.items():
                            states.layers[layer][job.row] = hidden_TH
                elsewhere = {*states.sources, *(("negative",) if "contrast" in self.needs else ())}
                found += self._token_scores(
                    [view for view in group if view.job.view not in elsewhere], rows, head
                )
            for job, length, logp_T, entropy_T in _on_cpu(found):
                if job.view == "primary":
                    teacher_logp[job.row, :length] = logp_T
                    entropy[job.row, :length] = entropy_T
                elif job.view == "untempered":
                    untempered_logp[job.row, :length] = logp_T
                elif job.view == "negative":
                    negative_logp[job.row, :length] = logp_T
                    if NEGATIVE in states.source_logp:
                        states.source_logp[NEGATIVE][job.row, :length] = logp_T
                elif job.view in states.source_logp:
                    states.source_logp[job.view][job.row, :length] = logp_T
                else:
                    auxiliary_logp[job.context, job.row, :length] = logp_T

        with (
            inference(self.backbone.causal_lm, keep=self.merge_once),
            self.teacher.in_place(),
            self._context(),
        ):
            head = self.backbone.head()
            record(jobs)
            if "auxiliary" in self.needs and self.choose_rows is not None:
                chosen_B = self.choose_rows(
                    torch.where(mask, entropy, 0.0).sum(-1) / mask.sum(-1).clamp(min=1)
                )
                record([job for job in auxiliary if chosen_B[job.row]])
                auxiliary_present &= chosen_B
            negative_divergence = zeros.clone() if "contrast" in self.needs else None
            for i, compared in self._contrasted(rows, states, negative_states, head):
                assert negative_divergence is not None
                negative_divergence[i, : len(compared[0])], negative_logp[i, : len(compared[0])] = compared
        for weights, other in self.others.items():
            with inference(self.backbone.causal_lm, keep=self.merge_once), other.in_place(), self._context():
                head = self.backbone.head()
                record([job for job in sources if job.view.startswith(f"{weights}/")])

        scores = StepScores(
            mask=mask,
            tokens=tokens,
            teacher_logp=teacher_logp if "teacher" in self.needs else None,
            untempered_logp=untempered_logp if "untempered" in self.needs else None,
            auxiliary_logp=auxiliary_logp if "auxiliary" in self.needs else None,
            auxiliary_present=auxiliary_present if "auxiliary" in self.needs else None,
            negative_logp=negative_logp if "negative" in self.needs else None,
            negative_present=torch.tensor([row.negative is not None for row in rows])
            if "negative" in self.needs
            else None,
            negative_divergence=negative_divergence,
            student_logp=None,
            teacher_entropy=entropy if "entropy" in self.needs else None,
            divergence=None,
        )
        if self.needs & {"student", "divergence"}:
            scores = self._add_student(scores, rows, states, device)
        return scores, states

    def leak_probe(
        self, rows: Sequence[ScoreRequest], device: torch.device | str, most_tokens: int
    ) -> Iterator[dict[str, Tensor]]:
        """Row by row the log-probabilities `[t,V]` of its views: student, primary, negative,
        unconditioned; base with a fixed teacher.

        At most `most_tokens` evenly spaced tokens of each answer. For diagnostics: these passes
        serve nothing else. One row's distributions are held at a time.
        """
        jobs = [_Job("primary", i, 0, row.teacher) for i, row in enumerate(rows)]
        jobs += [
            _Job("negative", i, 0, row.negative) for i, row in enumerate(rows) if row.negative is not None
        ]
        jobs += [
            _Job(name, i, 0, prompt) for i, row in enumerate(rows) for name, prompt in row.sources.items()
        ]
        if self.teacher.kind == "base":
            jobs += [_Job("base", i, 0, row.student) for i, row in enumerate(rows)]
        hidden: list[dict[str, Tensor]] = [{} for _ in rows]

        def record(jobs: Sequence[_Job]) -> None:
            for group in self._hidden_states(jobs, rows, device, Counter()):
                for view in group:
                    length = len(view.final_TH)
                    places = (
                        torch.linspace(0, length - 1, min(length, most_tokens), device=device).round().long()
                    )
                    hidden[view.job.row][view.job.view] = view.final_TH[places]

        # A context for each set of weights: within one, autocast remembers its casts of a
        # parameter, whatever its values are by then.
        with inference(self.backbone.causal_lm), self.teacher.in_place(), self._context():
            record(jobs)
        with inference(self.backbone.causal_lm), self._context():
            record([_Job("student", i, 0, row.student) for i, row in enumerate(rows)])
            heads = {"student": self.backbone.head()}
            other = teacher_head(self.backbone, self.teacher)
        for views in hidden:
            with torch.no_grad(), self._context():
                found = {
                    name: log_probs(heads.get(name, other).logits(h), self.spec.temperature)
                    for name, h in views.items()
                }
            yield found

    def _add_student(
        self,
        scores: StepScores,
        rows: Sequence[ScoreRequest],
        states: TeacherStates,
        device: torch.device | str,
    ) -> StepScores:
        """One student pass without gradient: its log-probabilities and the divergence before any
        update.
        """
        student_logp, divergence = torch.zeros(scores.mask.shape), torch.zeros(scores.mask.shape)
        head_of_teacher = teacher_head(self.backbone, self.teacher)
        jobs = [_Job("student", i, 0, row.student) for i, row in enumerate(rows)]
        with inference(self.backbone.causal_lm), self._context():
            head = self.backbone.head()
            for group in self._hidden_states(jobs, rows, device):
                student_NH = torch.cat([view.final_TH for view in group])
                teacher_NH = torch.cat([states.final[view.job.row] for view in group])
                target_N = _targets(group, rows, student_NH.device)
                lengths = [len(view.final_TH) for view in group]
                chosen = [view.job.row for view in group]
                values, present_N = states.of_target(
                    lambda of_rows, chosen=chosen: torch.cat([of_rows[i] for i in chosen]),  # type: ignore[misc]
                    lambda value_BT, chosen=chosen, lengths=lengths: torch.cat(  # type: ignore[misc]
                        [value_BT[i, :length] for i, length in zip(chosen, lengths, strict=True)]
                    ).to(device),
                    scores.mask.shape[1],
                )
                target = self.target_states(values, present_N)
                compared = _compare(
                    student_NH, head, teacher_NH, head_of_teacher, target_N, self.spec, target
                )
                logps, divergences = (
                    torch.split(value.cpu(), lengths)
                    for value in (compared.student_logp_N, compared.divergence_N)
                )
                for view, logp_T, divergence_T in zip(group, logps, divergences, strict=True):
                    student_logp[view.job.row, : len(logp_T)] = logp_T
                    divergence[view.job.row, : len(logp_T)] = divergence_T
        return replace(scores, student_logp=student_logp, divergence=divergence)

    def _contrasted(
        self, rows: Sequence[ScoreRequest], states: TeacherStates, negative: Mapping[int, Tensor], head: Head
    ) -> Iterator[tuple[int, tuple[Tensor, Tensor]]]:
        """Row, KL(q||q-) and l- `[T_i]` at the distillation temperature, of the rows in `negative`
        (states under the wrong reference).
        """
        if not negative:
            return
        negative_NH, teacher_NH = (
            torch.cat(list(negative.values())),
            torch.cat([states.final[i] for i in negative]),
        )
        target_N = torch.tensor(
            [token for i in negative for token in rows[i].completion], device=negative_NH.device
        )
        spec = DivergenceSpec(alpha=0.0, temperature=self.spec.temperature)
        compared = _compare(negative_NH, head, teacher_NH, head, target_N, spec)
        lengths = [len(rows[i].completion) for i in negative]
        parts = (
            torch.split(value.cpu(), lengths) for value in (compared.divergence_N, compared.student_logp_N)
        )
        yield from zip(negative, zip(*parts, strict=True), strict=True)

    def _token_scores(
        self, group: Sequence[_View], rows: Sequence[ScoreRequest], head: Head
    ) -> list[tuple[_Job, int, Tensor]]:
        """Log-probability of the realised tokens and entropy `[2,T_i]` of each view, left on the
        device; one projection for all.

        The primary teacher is projected here only where something looks at it before the loss does.
        """
        found = []
        primary = [view for view in group if view.job.view == "primary"]
        wanted = [view for view in group if view.job.view != "primary" or self.needs & {"teacher", "entropy"}]
        if "untempered" in self.needs:
            wanted += [replace(view, job=replace(view.job, view="untempered")) for view in primary]
        for temperature in sorted({self._temperature(view) for view in wanted}):
            alike = [view for view in wanted if self._temperature(view) == temperature]
            hidden_NH = torch.cat([view.final_TH for view in alike])
            target_N = _targets(alike, rows, hidden_NH.device)
            if "entropy" in self.needs:
                scores_2N = torch.stack(token_scores(hidden_NH, head, target_N, temperature))
            else:
                # the entropy is not looked at
                scores_2N = token_logprobs(hidden_NH, head, target_N, temperature).expand(2, -1)
            parts = torch.split(scores_2N, [len(view.final_TH) for view in alike], dim=1)
            found += [(view.job, part.shape[1], part) for view, part in zip(alike, parts, strict=True)]
        return found

    def _temperature(self, view: _View) -> float:
        return 1.0 if view.job.view in ("auxiliary", "untempered") else self.spec.temperature

    def _hidden_states(
        self,
        jobs: Sequence[_Job],
        rows: Sequence[ScoreRequest],
        device: torch.device | str,
        tokens: Counter[str] | None = None,
    ) -> Iterator[list[_View]]:
        """The views of each forward pass: hidden states at the positions that predict the
        completion.

        tokens: where the tokens read are counted by view; None: with those of training.
        """
        tokens = self.tokens if tokens is None else tokens
        jobs = [job for job in jobs if rows[job.row].completion]
        with in_step(self.backbone.model):
            if self.share_prompts:
                # A pass that shares beginnings holds them all; a long prompt would leave its
                # generations little room there.
                least = max(SHARED_FROM, self.token_budget // 4 if self.share_prefixes else 0)
                shared, jobs = _sharing(jobs, rows, least)
                for alike in shared:
                    completions = [rows[job.row].completion for job in alike]
                    for chosen in forward_batches(
                        [len(c) for c in completions], self.token_budget, packed=False
                    ):
                        captured, starts = self.backbone.continuations(
                            alike[0].prompt,
                            [completions[i] for i in chosen],
                            self.pad_id,
                            device,
                            self.layers,
                        )
                        tokens[alike[0].view] += len(alike[0].prompt)
                        for i in chosen:
                            tokens[alike[i].view] += len(completions[i])
                        yield [
                            _view(captured, alike[i], s, len(completions[i]))
                            for s, i in zip(starts, chosen, strict=True)
                        ]
            for together, batch, starts, read in self._laid_out(jobs, rows, device):
                captured = self.backbone.hidden_states(batch, self.layers)
                for job, length in zip(together, read, strict=True):
                    tokens[job.view] += length
                yield [
                    _view(captured, job, start + len(job.prompt) - 1, len(rows[job.row].completion))
                    for job, start in zip(together, starts, strict=True)
                ]

    def _laid_out(
        self, jobs: Sequence[_Job], rows: Sequence[ScoreRequest], device: torch.device | str
    ) -> Iterator[tuple[list[_Job], Batch, list[int], list[int]]]:
        """The forward passes: jobs, their sequences laid out, where each begins and how many of its
        tokens are read.
        """
        sequences = [job.prompt + rows[job.row].completion for job in jobs]
        if self.share_prefixes:
            # A prompt's last token predicts the completion's first: it is the first that a job has
            # for itself.
            shareable = [len(job.prompt) - 1 for job in jobs]
            for chosen in map(sorted, shared_batches(sequences, shareable, self.token_budget)):
                laid = collate_shared([sequences[i] for i in chosen], [shareable[i] for i in chosen], device)
                yield [jobs[i] for i in chosen], laid.batch, laid.starts, laid.read
            return
        for chosen in forward_batches([len(s) for s in sequences], self.token_budget, self.packed):
            batch = collate([sequences[i] for i in chosen], self.packed, self.pad_id, device)
            yield [jobs[i] for i in chosen], batch, batch.starts, [len(sequences[i]) for i in chosen]


def _view(captured: Captured, job: _Job, first: int, length: int) -> _View:
    """Cut one job's states out of a forward pass; cloned, so that they do not keep the whole pass
    alive.
    """
    assert captured.final is not None
    span = slice(first, first + length)
    kept = captured.layers.items() if job.view == "primary" else ()
    layers_TH = {layer: hidden.flatten(0, 1)[span].clone() for layer, hidden in kept}
    return _View(job, captured.final.flatten(0, 1)[span].clone(), layers_TH)


def _sharing(
    jobs: Sequence[_Job], rows: Sequence[ScoreRequest], least: int
) -> tuple[list[list[_Job]], list[_Job]]:
    """Jobs whose prompt, of `least` tokens or more, is worth a pass for all of them (the
    generations of a prompt), and the other jobs.
    """
    by_prompt: dict[tuple[int, ...], list[_Job]] = {}
    for job in jobs:
        by_prompt.setdefault(tuple(job.prompt), []).append(job)
    shared, others = [], []
    for prompt, alike in by_prompt.items():
        saved = len(prompt) * (len(alike) - 1)
        rest = len(prompt) + sum(len(rows[job.row].completion) for job in alike)
        if len(prompt) >= least and saved >= rest / 2:
            shared.append(alike)
        else:
            others += alike
    return shared, others


def _on_cpu(found: Sequence[tuple[_Job, int, Tensor]]) -> Iterator[tuple[_Job, int, Tensor, Tensor]]:
    """The scores of all views, copied from the device at once: the only wait of the phase."""
    if found:
        parts = torch.split(
            torch.cat([scores_2T for _, _, scores_2T in found], dim=1).cpu(),
            [length for _, length, _ in found],
            dim=1,
        )
        for (job, length, _), (logp_T, entropy_T) in zip(found, parts, strict=True):
            yield job, length, logp_T, entropy_T


def _targets(group: Sequence[_View], rows: Sequence[ScoreRequest], device: torch.device | str) -> Tensor:
    """The realised tokens of all views, end to end."""
    return torch.tensor([token for view in group for token in rows[view.job.row].completion], device=device)


def teacher_head(backbone: Backbone, teacher: Teacher) -> Head:
    """The head with the teacher's weights (they differ from the student's when the head is
    trained).
    """
    module = backbone.head_module
    weight, bias = module.weight, module.bias
    return backbone.head(teacher.weight(weight), None if bias is None else teacher.weight(bias))


def _compare(
    student_TH: Tensor,
    student_head: Head,
    teacher_TH: Tensor,
    teacher_head: Head,
    target_T: Tensor,
    spec: DivergenceSpec,
    target: TargetStates | None = None,
) -> LossOutput:
    """Divergence, log-probability and entropy per token, without gradient."""
    nothing_T = torch.zeros(len(target_T), device=student_TH.device)
    return chunked_loss(
        LossInputs(
            student_TH, student_head, teacher_TH, teacher_head, target_T, spec, nothing_T, target=target
        )
    )
