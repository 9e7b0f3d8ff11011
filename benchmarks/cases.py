"""What is measured: the loss alone, the scoring phase, a whole step, generation, the main job, and
growth.
"""

from __future__ import annotations

import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from peft import get_peft_model

from benchmarks import limit, ours, plain, vllm_peer
from benchmarks.measure import Samples, interleave, measure, peak_tflop_per_s
from benchmarks.settings import Star
from benchmarks.shapes import EOS, PAD, Example, build, examples, lora, twin
from unisd.losses.chunked import chunked_loss, default_chunk_tokens
from unisd.losses.head import Head
from unisd.losses.terms import LossInputs
from unisd.memory import MIB
from unisd.methods.divergence import DivergenceSpec
from unisd.teacher import Teacher

Rows = list[dict[str, Any]]
Ratios = dict[str, float]
Function = Callable[[], float]
T = TypeVar("T")


EXTRAS = ("sdft trl topk_logits", "star equal limit")
"""Left out on a CPU unless named: `loss` and `step` together are to end within 12 minutes on two
cores.
"""


@dataclass(frozen=True)
class Options:
    """What the command line sets."""

    shape: str = "qwen2.5-0.5b"
    layers: int | None = None
    device: torch.device = torch.device("cpu")
    repetitions: int = 3
    seconds: float = 200.0
    tokens: int = 512
    prompt: int = 64
    completion: int = 128
    batch: int = 2
    accumulation: int = 2
    impls: tuple[str, ...] | None = None
    full: bool = False

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32

    def chosen(self, functions: dict[str, T]) -> dict[str, T]:
        """Those that were asked for; without a word, all but the slow extras on a CPU."""
        extras = () if self.full or self.device.type != "cpu" else EXTRAS
        return {
            name: f
            for name, f in functions.items()
            if (name in self.impls if self.impls else name not in extras)
        }


def _ratio(samples: dict[str, Samples], name: str, one: str, other: str, what: str, out: Ratios) -> None:
    if one in samples and other in samples:
        key = "extra_memory_mb" if what == "extra_memory" else "time_s"
        out[name] = samples[one].row(one)[key] / max(samples[other].row(other)[key], 1e-9)


# --------------------------------------------------------------------------------------------- loss


def loss(o: Options) -> tuple[Rows, Ratios]:
    """JSD of N tokens from hidden states, weighted and clipped: forward and backward, with a frozen
    and a trained head.

    TRL's kernel has neither weights nor clip, and is measured without them.
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

    def run(value: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], trained: bool) -> Function:
        def call() -> float:
            hidden, head = student_NH.clone().requires_grad_(), head_VH.detach().requires_grad_(trained)
            result = value(hidden, head)
            result.backward()
            return float(result.detach())

        return call

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
    _ratio(samples, "time_vs_plain", "ours", "plain", "time", ratios)
    _ratio(samples, "time_vs_trl", "ours", "trl", "time", ratios)
    _ratio(samples, "extra_memory_vs_plain", "ours", "plain", "extra_memory", ratios)
    _ratio(samples, "extra_memory_vs_trl", "ours", "trl", "extra_memory", ratios)
    _ratio(samples, "trained_time_vs_plain", "ours (trained head)", "plain (trained head)", "time", ratios)
    return [sample.row(name) for name, sample in samples.items()], ratios


# --------------------------------------------------------------------------------------------- step


def _cut(rows: Sequence[Example], batch: int) -> list[list[Example]]:
    return [list(rows[i : i + batch]) for i in range(0, len(rows), batch)]


def manual_step(
    base: Any, rows: Sequence[Example], s: Star, batch: int, function: Callable[..., float], *extra: Any
) -> Function:
    """An optimizer step around `function`, with LoRA, gradient checkpointing and an EMA teacher of
    its own.
    """
    torch.manual_seed(42)
    model = get_peft_model(twin(base), lora())
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=s.learning_rate, weight_decay=0.0)
    prime(optimizer)
    teacher = Teacher(model, "ema", s.ema_rate)
    batches = _cut(rows, batch)

    def call() -> float:
        model.train()
        with as_trained(base):
            value = function(model, teacher.in_place, batches, *extra)
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        teacher.update(1)
        return value

    return call


def as_trained(base: Any) -> Any:
    """Mixed precision around a model in bfloat16, as the trainers have it: its adapter is float32.

    Nothing is remembered of the adapter, which holds the teacher's weights for a while.
    """
    return torch.autocast(
        base.device.type, dtype=torch.bfloat16, enabled=base.dtype == torch.bfloat16, cache_enabled=False
    )


def primed(trainer: Any) -> Any:
    """The trainer with what happens once in a run, not in every step, done: its optimizer's states,
    a collection of garbage.
    """
    prime(trainer.create_optimizer())
    trainer.accelerator.free_memory = lambda *objects: list(objects)  # `measure` does it
    return trainer


def prime(optimizer: torch.optim.Optimizer) -> None:
    """A step with zero gradients: it moves nothing (no weight decay) and makes the states."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.zeros_like(p)
    optimizer.step()
    optimizer.zero_grad()


def star_steps(base: Any, rows: Sequence[Example], s: Star, batch: int) -> dict[str, Callable[[], Function]]:
    """UniSD* of the same rows by ours, the plain version and the bare limit; each is built when it
    is called for.
    """
    chunk = default_chunk_tokens(base.config.vocab_size, base.device)
    options = ours.star_options(s, len(rows[0].auxiliary))
    return {
        "ours": lambda: partial(ours.step, primed(ours.trainer(twin(base), rows, s, options, batch))),
        "plain": lambda: manual_step(base, rows, s, batch, plain.star_step, s),
        "limit": lambda: manual_step(base, rows, s, batch, limit.star_step, chunk),
    }


def sdft_steps(base: Any, rows: Sequence[Example], s: Star, batch: int) -> dict[str, Callable[[], Function]]:
    """SDFT (EMA teacher, full divergence, no mechanism) of the same rows by ours and by TRL."""

    def trl(mode: str) -> Function:
        from benchmarks import trl_peer

        return partial(trl_peer.step, primed(trl_peer.trainer(twin(base), rows, s, mode, batch)))

    return {
        "ours": lambda: partial(
            ours.step, primed(ours.trainer(twin(base), rows, s, {"distillation_alpha": s.alpha}, batch))
        ),
        "trl full_logits": lambda: trl("full_logits"),
        "trl topk_logits": lambda: trl("topk_logits"),
    }


def step(o: Options) -> tuple[Rows, Ratios]:
    """A whole optimizer step without generation: SDFT against TRL; UniSD* at equal and at mixed
    lengths.
    """
    base, s, count = build(o.shape, o.device, o.dtype, o.layers), Star(), o.batch * o.accumulation
    V = base.config.vocab_size
    equal = examples(V, count, (o.prompt, o.prompt), (o.completion, o.completion))
    mixed = examples(V, count, (o.prompt // 2, o.prompt * 3), (max(o.completion // 8, 1), o.completion * 2))
    rows: Rows = []
    ratios: Ratios = {}
    for prefix, make, data in (
        ("sdft", sdft_steps, equal),
        ("star equal", star_steps, equal),
        ("star", star_steps, mixed),
    ):
        chosen = o.chosen({f"{prefix} {name}": f for name, f in make(base, data, s, o.batch).items()})
        functions = {name: make_step() for name, make_step in chosen.items()}
        with torch.no_grad():  # libraries set themselves up in their first product
            base(
                input_ids=torch.tensor([data[0].student], device=o.device), use_cache=False, logits_to_keep=1
            )
        samples = interleave(
            functions, o.device, o.repetitions, o.seconds / 3, warm_up=o.device.type != "cpu"
        )
        rows += [sample.row(name) for name, sample in samples.items()]
        if prefix != "sdft":
            for row in rows[len(rows) - len(samples) :]:
                row["tokens_per_s"] = passed_tokens(data) / row["time_s"]
                row["tflop_per_s"] = needed_flop(base, data) / row["time_s"] / 1e12
                if (peak := peak_tflop_per_s(o.device)) is not None:
                    row["mfu"] = row["tflop_per_s"] / peak
        one = f"{prefix} ours"
        if prefix == "sdft":
            for what in ("time", "extra_memory"):
                _ratio(samples, f"sdft_{what}_vs_trl", one, "sdft trl full_logits", what, ratios)
                _ratio(samples, f"sdft_{what}_vs_trl_topk", one, "sdft trl topk_logits", what, ratios)
        else:
            key = prefix.replace(" ", "_")
            for what in ("time", "extra_memory"):
                _ratio(samples, f"{key}_{what}_vs_plain", one, f"{prefix} plain", what, ratios)
            _ratio(samples, f"{key}_time_vs_limit", one, f"{prefix} limit", "time", ratios)
    return rows, ratios


# -------------------------------------------------------------------------------------------------
# score and generate


def score(o: Options) -> tuple[Rows, Ratios]:
    """The phase without gradient of a UniSD* step: all K + 2 views of all rows, at mixed
    lengths.
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
        for rows in _cut(data, o.batch):
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
    _ratio(samples, "time_vs_plain", "ours", "plain", "time", ratios)
    _ratio(samples, "extra_memory_vs_plain", "ours", "plain", "extra_memory", ratios)
    _ratio(samples, "time_vs_limit", "ours", "limit", "time", ratios)
    return [sample.row(name) for name, sample in samples.items()], ratios


def generate(o: Options) -> tuple[Rows, Ratios]:
    """Sampling with lengths that differ: rows are made to end where the mixed lengths say, by a
    processor both sides run.

    `--impls ours plain vllm` adds vLLM (where it is installed), which is asked for these lengths,
    and the seconds of a sync of all weights.
    """
    from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

    from unisd.rollout.decoding import decode

    model = build(o.shape, o.device, o.dtype, o.layers)
    data = examples(
        model.config.vocab_size,
        4 * o.batch * o.accumulation,
        (o.prompt // 2, o.prompt * 3),
        (o.completion // 8, o.completion),
    )
    prompts, lengths = [row.student for row in data], [len(row.completion) for row in data]

    class EndsAt(LogitsProcessor):  # type: ignore[misc]
        def __init__(self, rows: Sequence[int], width: int) -> None:
            self.ends, self.width = torch.tensor([lengths[i] for i in rows], device=o.device), width

        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            ended_B1 = (input_ids.shape[1] - self.width + 1 >= self.ends)[:, None]
            end_1V = torch.arange(scores.shape[1], device=scores.device)[None] == EOS
            return scores.masked_fill(ended_B1 != end_1V, float("-inf"))

    def run_ours() -> float:
        written = decode(
            model, prompts, o.completion, eos_ids=[EOS], pad_id=PAD,
            processors=lambda rows, width: LogitsProcessorList([EndsAt(rows, width)]),
        )  # fmt: skip
        return float(sum(map(len, written)))

    config = GenerationConfig(
        do_sample=False, max_new_tokens=o.completion, eos_token_id=EOS, pad_token_id=PAD
    )

    @torch.no_grad()
    def run_plain() -> float:
        ids, mask = plain.padded(prompts, "left", o.device)
        processors = LogitsProcessorList([EndsAt(range(len(prompts)), ids.shape[1])])
        out = model.generate(
            input_ids=ids, attention_mask=mask, generation_config=config, logits_processor=processors
        )
        return float((out[:, ids.shape[1] :] != PAD).sum())

    functions, sync = {"ours": run_ours, "plain": run_plain}, None
    if "vllm" in (o.impls or ()):
        functions["vllm"], sync = vllm_peer.writer(model, prompts, lengths)
    samples = interleave(o.chosen(functions), o.device, o.repetitions, o.seconds)
    ratios: Ratios = {}
    _ratio(samples, "time_vs_plain", "ours", "plain", "time", ratios)
    _ratio(samples, "vllm_time_vs_ours", "vllm", "ours", "time", ratios)
    if sync is not None:
        ratios["vllm_sync_s"] = statistics.median(sync() for _ in range(3))
    rows = [sample.row(name) for name, sample in samples.items()]
    for row in rows:
        row["tokens_per_s"] = row["value"] / row["time_s"]
    return rows, ratios


# ----------------------------------------------------------------------------------------- main job


def main_job(o: Options) -> tuple[Rows, Ratios]:
    """`unisd train` as the README gives it, in a process of its own: wall time and peak memory of
    all of it.
    """
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        command = [sys.executable, "-m", "unisd.cli.main", "train", "--output_dir", str(Path(folder) / "out")]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024 * MIB / 1e6
    return [{"impl": "ours", "time_s": seconds, "extra_memory_mb": peak}], {"minutes": seconds / 60}


# ------------------------------------------------------------------------------------------- memory


def memory_plan(o: Options) -> tuple[Rows, Ratios]:
    """Peak memory of an SDFT and a UniSD* run (weights, optimizer, teacher, one step) beside what
    `--dry_run` predicts.
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


# ------------------------------------------------------------------------------------------- growth

AXES: dict[str, list[int]] = {
    "K": [0, 2, 4, 8],
    "completion": [32, 64, 128, 256],
    "vocabulary": [8_000, 32_000, 128_000],
    "rows": [2, 4, 8, 16],
}


def growth(o: Options) -> tuple[Rows, Ratios]:
    """A UniSD* step of ours and the bare passes against K, completion length, vocabulary and rows
    (try `--shape llama-32k --layers 4`).

    Beside each time stands the number of tokens that pass the model, counted once per forward
    without gradient and three times for the student's. `slope_*` is the cost of one more token over
    that of the bare limit; `memory_growth_vocabulary` the extra memory at the largest vocabulary
    over that at the smallest.
    """
    rows: Rows = []
    ratios: Ratios = {}
    found: dict[str, list[tuple[int, float, float, float]]] = {axis: [] for axis in AXES}
    for axis, values in AXES.items():
        for value in values:
            at = {"K": 3, "completion": 64, "rows": 4} | ({} if axis == "vocabulary" else {axis: value})
            base = build(
                o.shape if axis != "vocabulary" else f"{o.shape}:{value}", o.device, o.dtype, o.layers
            )
            data = examples(
                base.config.vocab_size,
                at["rows"],
                (o.prompt, o.prompt),
                (at["completion"],) * 2,
                contexts=at["K"],
            )
            steps = star_steps(base, data, Star(), o.batch)
            samples = interleave(
                {name: steps[name]() for name in ("ours", "limit")}, o.device, o.repetitions, o.seconds / 16
            )
            tokens = passed_tokens(data)
            for name, sample in samples.items():
                rows.append(sample.row(name) | {"axis": axis, "at": value, "passed_tokens": tokens})
            a, b = (samples[name].row(name) for name in ("ours", "limit"))
            found[axis].append((tokens, a["time_s"], b["time_s"], a["extra_memory_mb"]))
    for axis in ("K", "completion", "rows"):
        ratios[f"slope_{axis}_vs_limit"] = slope([(t, a) for t, a, _, _ in found[axis]]) / slope(
            [(t, b) for t, _, b, _ in found[axis]]
        )
        ratios[f"r2_{axis}"] = linearity([(t, a) for t, a, _, _ in found[axis]])
    ratios["memory_growth_vocabulary"] = found["vocabulary"][-1][3] / max(found["vocabulary"][0][3], 1e-9)
    return rows, ratios


def passed_tokens(data: Sequence[Example]) -> int:
    """Tokens that a UniSD* step passes through the model: once without gradient under every view
    (the problem of the right reference is that of the wrong one), three times for the student
    (forward, forward again for checkpointing, backward with frozen weights).
    """
    return sum(
        sum(len(view) + len(row.completion) for view in (row.teacher, row.negative, *row.auxiliary))
        + 2 * len(row.student)
        + 3 * len(row.completion)
        for row in data
    )


def needed_flop(base: Any, data: Sequence[Example]) -> float:
    """Floating-point operations of these passes, and of K + 4 products with the head for each
    completion token; without attention.
    """
    body = sum(p.numel() for name, p in base.get_decoder().named_parameters() if "embed" not in name)
    answers = sum(len(row.completion) * (len(row.auxiliary) + 4) for row in data)
    return 2.0 * (body * passed_tokens(data) + base.get_output_embeddings().weight.numel() * answers)


def slope(points: Sequence[tuple[float, float]]) -> float:
    """Least-squares slope."""
    x, y = (torch.tensor(v, dtype=torch.float64) for v in zip(*points, strict=True))
    return float(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum())


def linearity(points: Sequence[tuple[float, float]]) -> float:
    """Squared correlation: 1 where the cost is linear."""
    x, y = (torch.tensor(v, dtype=torch.float64) for v in zip(*points, strict=True))
    return float(torch.corrcoef(torch.stack([x, y]))[0, 1] ** 2)


CASES: dict[str, Callable[[Options], tuple[Rows, Ratios]]] = {
    "loss": loss, "score": score, "step": step, "generate": generate, "main": main_job, "memory": memory_plan, "growth": growth,
}  # fmt: skip
