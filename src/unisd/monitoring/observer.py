"""What a run shows of itself: metrics of answers and loss, sampled records, probes.

Nothing here changes the training.

Shapes: B rows of the step, T longest completion, N loss tokens of a micro-batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn

from unisd.config import UniSDConfig
from unisd.data.prompts import PromptBuilder
from unisd.data.rows import Row, prepare_rows
from unisd.distributed.collectives import on_all_ranks
from unisd.files import PROBE, SAMPLES
from unisd.losses.terms import LossInputs, LossOutput
from unisd.methods.scores import StepScores
from unisd.monitoring.diagnostics import Answers, Counting, answer_tokens, answers_to_keep, means, probe_leak
from unisd.monitoring.metrics import StepMetrics, mean
from unisd.monitoring.token_records import SampleRecorder
from unisd.rollout.engine import Completion, Engine, Sampling
from unisd.scoring.requests import ScoreRequest
from unisd.scoring.scorer import Scorer

if TYPE_CHECKING:
    from unisd.training.step import MicroBatch


@dataclass
class Probes:
    """Measures, now and then, what costs passes of its own.

    Every `diagnostics_probe_steps`; see :mod:`unisd.monitoring.diagnostics`.
    """

    args: UniSDConfig
    dataset: Any  # rows of what must not be lost, with or without references; or None
    model: nn.Module
    tokenizer: Any
    prompts: PromptBuilder
    engine: Engine
    sampling: Sampling
    scorer: Scorer
    is_writer: bool
    _answers: list[Row] | None = None

    def __post_init__(self) -> None:
        found = self.dataset
        self.rows = [] if found is None else prepare_rows(found, name="the probe set", needs_reference=False)

    def run(self, scored: Sequence[tuple[Row, ScoreRequest]], step: int) -> dict[str, float]:
        """Measure this rank's share of the probe set, and of the step's answers.

        The likelihood of the former, and the latter under other contexts.
        """
        from unisd.evaluation.likelihood import reference_nll

        values: dict[str, float] = {}
        if self.rows:
            if self._answers is None:
                self._answers = answers_to_keep(
                    self.rows[: self.args.diagnostics_probe_rows],
                    lambda rows: self.engine.generate(
                        [self.prompts.student(row) for row in rows], None, self.sampling
                    ),
                    self.tokenizer,
                    Path(self.args.output_dir) / PROBE,
                    resumed=step > 0,
                    is_writer=self.is_writer,
                )
            nll, tokens = reference_nll(self.model, self.tokenizer, self._answers)
            values["retained/nll"] = nll / max(tokens, 1)
        if self.args.distillation_mode != "nll":
            values |= probe_leak(
                self.scorer, self.prompts, scored[: self.args.diagnostics_probe_rows], self.args.device
            )
        return values


def outcomes(scores: StepScores) -> dict[str, float]:
    """The verdicts on a step's answers: shares of the judged that passed and mean score, of groups
    of which all, none or some passed, and of answers without a verdict.
    """
    assert scores.score is not None and scores.passed is not None and scores.group is not None

    def share(values: Tensor) -> float:
        return float(values.double().mean())

    judged = scores.score.isfinite()
    found = {"outcome/no_verdict": share(~judged)}
    if not judged.any():
        return found
    found["outcome/passed"] = share(scores.passed[judged])
    found["outcome/score"] = share(scores.score[judged])
    named = sorted(set(scores.group[judged].tolist()))
    groups = [scores.passed[judged & (scores.group == group)] for group in named]
    kinds = ["all" if group.all() else "some" if group.any() else "none" for group in groups]
    return found | {f"outcome/groups_{k}": kinds.count(k) / len(kinds) for k in ("all", "some", "none")}


class Observer:
    """Fills `metrics` and the sampled records of the step in progress.

    Args:
        grader: verdict on a completion, for the records; or None.
        probes: run every `diagnostics_probe_steps`, if there are diagnostics.
    """

    def __init__(
        self,
        args: UniSDConfig,
        accelerator: Accelerator,
        metrics: StepMetrics,
        tokenizer: Any,
        grader: Callable[[Row, str], Any] | None,
        probes: Probes,
    ) -> None:
        self.args = args
        self.accelerator = accelerator
        self.metrics = metrics
        self.tokenizer = tokenizer
        self.probes = probes
        recorded = args.record_samples if accelerator.is_main_process else 0
        self.samples = SampleRecorder(
            Path(args.output_dir) / SAMPLES, recorded, tokenizer, grader, args.verdict_seconds
        )
        self.counting = Counting(tokenizer, args.diagnostics_words) if args.diagnostics else None
        self._pending: Callable[[], dict[str, float]] | None = None

    def before_loss(
        self,
        completions: Sequence[Completion],
        everywhere: StepScores,
        token_clip: float | None,
        pending: Callable[[], dict[str, float]] | None = None,
    ) -> None:
        """Metrics that are known before the student's pass. everywhere: the scores of all ranks.

        pending: gives those that are known after it (a collective: all ranks must ask).
        """
        self._pending = pending
        pairs = [(len(completion.ids), completion.truncated) for completion in completions]
        if self.accelerator.num_processes > 1:
            pairs = gather_object(pairs)
        values = self.metrics.values
        values["completions/mean_length"] = mean([length for length, _ in pairs])
        values["completions/max_length"] = float(max(length for length, _ in pairs))
        values["completions/truncated_share"] = mean([truncated for _, truncated in pairs])
        if everywhere.negative_logp is not None and everywhere.negative_present is not None:
            mask = everywhere.mask & everywhere.negative_present[:, None]
            if mask.any():
                values["contrastive/negative_logp"] = float(everywhere.negative_logp[mask].mean())
        if token_clip is not None:
            values["clip/threshold"] = token_clip
        if everywhere.score is not None:
            values.update(outcomes(everywhere))

    def record(
        self,
        step: int,
        max_steps: int,
        rows: Sequence[Row],
        completions: Sequence[Completion],
        scores: StepScores,
        weights_BT: Tensor,
    ) -> None:
        """Open the records of step number `step` (from 1), if it is one of those recorded."""
        if self.samples.wants(step, max_steps, self.args.logging_steps):
            self.samples.begin(
                step, rows, completions, scores, weights_BT, self.args.divergence_spec.temperature
            )

    def diagnose(
        self,
        rows: Sequence[Row],
        scored: Sequence[ScoreRequest],
        completions: Sequence[Completion],
        step: int,
        width: int,
    ) -> dict[str, Tensor]:
        """Say what the step's answers are made of, over all ranks, and now and then the probes.

        step: number of finished ones.

        Returns marks `[B,T]`, 1 or 0, T = `width`, of the tokens that are an answer's final answer,
        and of those of style.
        """
        assert self.counting is not None
        counted = self.counting.count(rows, [completion.ids for completion in completions])
        if self.accelerator.num_processes > 1:
            counted = sum(gather_object([counted]), Answers())
        self.metrics.values |= counted.metrics(self.counting.hedges)
        every = self.args.diagnostics_probe_steps
        if every is not None and step % every == 0:
            found = [
                on_all_ranks(
                    self.accelerator, lambda: self.probes.run(list(zip(rows, scored, strict=True)), step)
                )
            ]
            if self.accelerator.num_processes > 1:  # all ranks must come to the same alarms
                found = gather_object(found)
            self.metrics.values |= means(found)
        marks = {
            "answer": torch.zeros(len(completions), width),
            "style": torch.zeros(len(completions), width),
        }
        for i, completion in enumerate(completions):
            marks["answer"][i, : len(completion.ids)] = torch.tensor(
                answer_tokens(self.tokenizer, completion.ids)
            ).float()
            marks["style"][i, : len(completion.ids)] = torch.tensor(
                self.counting.style(completion.ids)
            ).float()
        return marks

    def after_loss(self, micro_batch: MicroBatch, inputs: LossInputs, output: LossOutput) -> None:
        """Sums over one micro-batch's loss tokens. Nothing here may wait for the device."""
        divergence_N = output.divergence_N
        of_tokens = {
            "divergence": divergence_N,
            "entropy": output.student_entropy_N,
            "clipped": output.clipped_N,
            "student_logp": output.student_logp_N,
        }
        if self.args.distillation_mode != "nll":
            of_tokens["teacher_logp"] = output.teacher_logp_N
        if self.counting is not None:
            weighed_N = (micro_batch.coefficient_N * divergence_N).abs()
            answer_N = micro_batch.marks["answer"]
            of_tokens |= {"style_loss": weighed_N * micro_batch.marks["style"], "whole_loss": weighed_N}
            of_tokens |= {"answer_loss": weighed_N * answer_N, "answer_tokens": answer_N}
        for name, term in output.terms.items():
            # It is 0 where a row lacks it. Selecting by mask would wait for the device.
            of_tokens |= {f"term/{name}": term.values_N, f"term_tokens/{name}": term.coefficient_N > 0}
            if term.active_N is not None:
                of_tokens[f"term_active/{name}"] = term.active_N
        sums = torch.stack([value_N.to(divergence_N.dtype) for value_N in of_tokens.values()]).sum(-1)
        self.metrics.add(tokens=len(divergence_N), **dict(zip(of_tokens, sums.unbind(), strict=True)))
        spans = self.samples.spans(micro_batch.part, micro_batch.step.scores.mask)
        self.samples.take(spans, inputs, output)

    def after_last_loss(self) -> None:
        """Metrics that are known when all micro-batches of the step are done."""
        if self._pending is not None:
            self.metrics.values |= self._pending()
