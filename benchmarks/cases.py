"""Measures the loss alone, the scoring phase, generation, the main job and the memory plan.

A whole step, a whole run and growth have modules of their own; `CASES` names them all.
"""

from __future__ import annotations

import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from benchmarks import continuous_peer, limit, ours, plain, vllm_peer
from benchmarks.growth import growth
from benchmarks.measure import Samples, interleave, measure
from benchmarks.newcomer import newcomer
from benchmarks.options import Function, Options, Ratios, Rows, ratio
from benchmarks.settings import Star
from benchmarks.shapes import EOS, PAD, build, examples, lora, twin
from benchmarks.startup import start
from benchmarks.steps import as_trained, cut, primed, step
from benchmarks.whole_run import run
from unisd.losses.chunked import chunked_loss, default_chunk_tokens
from unisd.losses.head import Head
from unisd.losses.terms import LossInputs
from unisd.memory import MIB
from unisd.methods.divergence import DivergenceSpec
from unisd.rollout.decoding import decode

# --------------------------------------------------------------------------------------------- loss


def _forward_and_backward(
    student_NH: torch.Tensor,
    head_VH: torch.Tensor,
    value: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    trained: bool,
) -> Function:
    def call() -> float:
        hidden, head = student_NH.clone().requires_grad_(), head_VH.detach().requires_grad_(trained)
        result = value(hidden, head)
        result.backward()
        return float(result.detach())

    return call


def loss(o: Options) -> tuple[Rows, Ratios]:
    """JSD of N tokens from hidden states, weighted and clipped: forward and backward.

    With a frozen and with a trained head. TRL's kernel has neither weights nor clip, and is
    measured without them.
    """
    from trl.trainer.distillation_trainer import _chunked_divergence_loss

    config = build(o.shape, torch.device("meta"), o.dtype, layers=1).config
    V, H, N, alpha, clip = config.vocab_size, config.hidden_size, o.tokens, 0.5, 0.4
    g = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g).to(o.device, o.dtype)

    head_VH, student_NH = normal(V, H) * 2 * H**-0.5, normal(N, H)
    teacher_NH = student_NH + 0.3 * normal(N, H)
    weights_N = (0.5 + 0.5 * torch.rand(N, generator=g)).to(o.device) / N
    targets_N = torch.randint(V, (N,), generator=g).to(o.device)
    ones = torch.ones(1, N, dtype=torch.long, device=o.device)
    spec = DivergenceSpec(alpha=alpha)

    def ours_value(hidden: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
        inputs = LossInputs(hidden, Head(head), teacher_NH, Head(head_VH), targets_N, spec, weights_N, clip)
        return chunked_loss(inputs).loss

    def plain_value(hidden: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            teacher = teacher_NH @ head_VH.T
        divergence_N = plain.kl_or_jsd((hidden @ head.T).float(), teacher.float(), alpha)
        return (weights_N * divergence_N.clamp(max=clip)).sum()

    def trl_value(hidden: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
        return _chunked_divergence_loss(
            hidden[None], teacher_NH[None], head, head_VH, ones, beta=alpha, num_items_in_batch=N
        )[0]

    run = partial(_forward_and_backward, student_NH, head_VH)
    functions = {
        "ours": run(ours_value, False),
        "plain": run(plain_value, False),
        "trl": run(trl_value, False),
        "ours (trained head)": run(ours_value, True),
        "plain (trained head)": run(plain_value, True),
    }
    student_NH[:16] @ head_VH.T  # libraries set themselves up in their first product
    samples = interleave(
        o.chosen(functions), o.device, o.repetitions, o.seconds, warm_up=o.device.type != "cpu"
    )
    ratios: Ratios = {}
    ratio(samples, "time_vs_plain", "ours", "plain", "time", ratios)
    ratio(samples, "time_vs_trl", "ours", "trl", "time", ratios)
    ratio(samples, "extra_memory_vs_plain", "ours", "plain", "extra_memory", ratios)
    ratio(samples, "extra_memory_vs_trl", "ours", "trl", "extra_memory", ratios)
    ratio(samples, "trained_time_vs_plain", "ours (trained head)", "plain (trained head)", "time", ratios)
    return [sample.row(name) for name, sample in samples.items()], ratios


# -------------------------------------------------------------------------------------------------
# score and generate


def score(o: Options) -> tuple[Rows, Ratios]:
    """Measure the phase without gradient of a UniSD* step.

    All K + 2 views of all rows, at mixed lengths.
    """
    base, s = build(o.shape, o.device, o.dtype, o.layers), Star()
    data = examples(
        base.config.vocab_size,
        o.batch * o.accumulation,
        (o.prompt // 2, o.prompt * 3),
        (o.completion // 8, o.completion * 2),
    )
    built = ours.trainer(twin(base), data, s, ours.star_options(s, len(data[0].auxiliary)), o.batch)
    model = get_peft_model(twin(base), lora())
    scoring_rows = ours.scoring_rows(data)

    def run_ours() -> float:
        scores, _ = built.scorer.score(scoring_rows, o.device)
        return float(scores.auxiliary_logp.sum()) if scores.auxiliary_logp is not None else 0.0

    @torch.no_grad()
    def run_plain() -> float:
        total = 0.0
        for rows in cut(data, o.batch):
            for k in range(len(rows[0].auxiliary)):
                logits, _, tokens, mask = plain.view(model, [r.auxiliary[k] for r in rows], rows)
                total += float(plain.realised(logits, tokens)[mask].sum())
            for prompts in ([r.teacher for r in rows], [r.negative for r in rows]):
                logits, _, tokens, _ = plain.view(model, prompts, rows)
                plain.realised(logits / s.temperature, tokens)
        return total

    @torch.no_grad()
    def run_limit() -> float:
        limit.score(model, data, default_chunk_tokens(base.config.vocab_size, o.device))
        return 0.0

    functions = o.chosen(
        {"ours": run_ours, "plain": as_trained(base)(run_plain), "limit": as_trained(base)(run_limit)}
    )
    samples = interleave(functions, o.device, o.repetitions, o.seconds)
    ratios: Ratios = {}
    ratio(samples, "time_vs_plain", "ours", "plain", "time", ratios)
    ratio(samples, "extra_memory_vs_plain", "ours", "plain", "extra_memory", ratios)
    ratio(samples, "time_vs_limit", "ours", "limit", "time", ratios)
    return [sample.row(name) for name, sample in samples.items()], ratios


class EndsAt(LogitsProcessor):  # type: ignore[misc]
    """Makes each row end after a number of tokens behind a prompt of `width`."""

    def __init__(self, lengths: Sequence[int], width: int, device: torch.device) -> None:
        self.ends, self.width = torch.tensor(lengths, device=device), width

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        ended_B1 = (input_ids.shape[1] - self.width + 1 >= self.ends)[:, None]
        end_1V = torch.arange(scores.shape[1], device=scores.device)[None] == EOS
        return scores.masked_fill(ended_B1 != end_1V, float("-inf"))


def generate(o: Options) -> tuple[Rows, Ratios]:
    """Sampling with lengths that differ.

    Rows are made to end where the mixed lengths say, by a processor that both sides run.
    `--impls ours plain continuous vllm` adds transformers' continuous batching and vLLM (where it
    is installed), which are asked for these lengths, and the seconds of vLLM's sync of all weights.
    """
    model = build(o.shape, o.device, o.dtype, o.layers)
    data = examples(
        model.config.vocab_size,
        4 * o.batch * o.accumulation,
        (o.prompt // 2, o.prompt * 3),
        (o.completion // 8, o.completion),
    )
    prompts, lengths = [row.student for row in data], [len(row.completion) for row in data]

    def ends_at(rows: Sequence[int], width: int) -> LogitsProcessorList:
        return LogitsProcessorList([EndsAt([lengths[i] for i in rows], width, o.device)])

    def run_ours() -> float:
        written = decode(
            model, prompts, o.completion, eos_ids=[EOS], pad_id=PAD,
            processors=ends_at,
        )  # fmt: skip
        return float(sum(map(len, written)))

    config = GenerationConfig(
        do_sample=False, max_new_tokens=o.completion, eos_token_id=EOS, pad_token_id=PAD
    )

    @torch.no_grad()
    def run_plain() -> float:
        ids, mask = plain.padded(prompts, "left", o.device)
        processors = ends_at(range(len(prompts)), ids.shape[1])
        out = model.generate(
            input_ids=ids, attention_mask=mask, generation_config=config, logits_processor=processors
        )
        return float((out[:, ids.shape[1] :] != PAD).sum())

    functions, sync = {"ours": run_ours, "plain": run_plain}, None
    if "continuous" in (o.impls or ()):
        functions["continuous"] = continuous_peer.writer(model, prompts, lengths)
    if "vllm" in (o.impls or ()):
        functions["vllm"], sync = vllm_peer.writer(model, prompts, lengths)
    samples = interleave(o.chosen(functions), o.device, o.repetitions, o.seconds)
    ratios: Ratios = {}
    ratio(samples, "time_vs_plain", "ours", "plain", "time", ratios)
    for name in ("continuous", "vllm"):
        ratio(samples, f"{name}_time_vs_ours", name, "ours", "time", ratios)
    if sync is not None:
        ratios["vllm_sync_s"] = statistics.median(sync() for _ in range(3))
    rows = [sample.row(name) for name, sample in samples.items()]
    for row in rows:
        row["tokens_per_s"] = row["value"] / row["time_s"]
    return rows, ratios


# ----------------------------------------------------------------------------------------- main job


def main_job(o: Options) -> tuple[Rows, Ratios]:
    """Run `unisd train` as the README gives it, in a process of its own.

    Wall time and peak memory of all of it.
    """
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        command = [sys.executable, "-m", "unisd", "train", "--output_dir", str(Path(folder) / "out")]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024 * MIB / 1e6
    return [{"impl": "ours", "time_s": seconds, "extra_memory_mb": peak}], {"minutes": seconds / 60}


# ------------------------------------------------------------------------------------------- memory


def memory_plan(o: Options) -> tuple[Rows, Ratios]:
    """Compare the peak memory of an SDFT and a UniSD* run with what `--dry_run` predicts.

    Weights, optimizer, teacher, one step.
    """
    from unisd.memory import ModelSize, estimate

    s = Star()
    rows: Rows = []
    ratios: Ratios = {}
    prompts, completions = (o.prompt, o.prompt), (o.completion, o.completion)
    for name, contexts, checkpointing in (
        ("sdft", 0, True),
        ("star", 3, True),
        ("star, no checkpointing", 3, False),
    ):
        if o.impls is not None and name not in o.impls:
            continue
        # a small run first: what libraries load and set up is not part of the plan
        tiny = build("tiny", o.device, o.dtype)
        ours.step(ours.trainer(tiny, examples(320, 2, (4, 4), (4, 4)), s, ours.star_options(s, 3), 1))
        samples = Samples()
        predicted: dict[str, int] = {}

        # Built before: making random weights holds a tied head twice for a moment, which loading
        # does not.
        base = build(o.shape, o.device, o.dtype, o.layers)
        weights = sum(p.numel() * p.element_size() for p in base.parameters())

        def run(
            base: Any = base,
            contexts: int = contexts,
            checkpointing: bool = checkpointing,
            predicted: dict[str, int] = predicted,
        ) -> float:
            data = examples(
                base.config.vocab_size, o.batch * o.accumulation, prompts, completions, contexts=contexts
            )
            options = ours.star_options(s, contexts) if contexts else {"distillation_alpha": s.alpha}
            built = ours.trainer(base, data, s, options | {"gradient_checkpointing": checkpointing}, o.batch)
            value = ours.step(primed(built))
            predicted |= estimate(ModelSize.of(built.model), built.args, len(data[0].teacher), rollout=False)
            return value

        measure(run, o.device, samples)
        row = samples.row(name)
        row["extra_memory_mb"] += weights / 1e6
        rows.append(row | {"predicted_mb": predicted["total"] / 1e6})
        ratios[f"predicted_vs_measured {name}"] = rows[-1]["predicted_mb"] / row["extra_memory_mb"]
    return rows, ratios


CASES: dict[str, Callable[[Options], tuple[Rows, Ratios]]] = {
    "loss": loss,
    "score": score,
    "step": step,
    "generate": generate,
    "main": main_job,
    "memory": memory_plan,
    "growth": growth,
    "start": start,
    "newcomer": newcomer,
    "run": run,
}
