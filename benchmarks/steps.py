"""A whole optimizer step, without generation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from peft import get_peft_model

from benchmarks import limit, ours, plain
from benchmarks.measure import interleave, peak_tflop_per_s
from benchmarks.options import Function, Options, Ratios, Rows, ratio
from benchmarks.settings import Star
from benchmarks.shapes import Example, build, examples, lora, twin
from unisd.losses.chunked import default_chunk_tokens
from unisd.teacher import Teacher


def cut(rows: Sequence[Example], batch: int) -> list[list[Example]]:
    """Micro-batches of the rows."""
    return [list(rows[i : i + batch]) for i in range(0, len(rows), batch)]


def manual_step(
    base: Any, rows: Sequence[Example], s: Star, batch: int, function: Callable[..., float], *extra: Any
) -> Function:
    """An optimizer step around `function`, with LoRA, checkpointing and an EMA teacher."""
    torch.manual_seed(42)
    model = get_peft_model(twin(base), lora())
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=s.learning_rate, weight_decay=0.0)
    prime(optimizer)
    teacher = Teacher(model, "ema", s.ema_rate)
    batches = cut(rows, batch)

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
    """The trainer with what happens once in a run done: optimizer's states, garbage collection."""
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


def star_steps(
    base: Any, rows: Sequence[Example], s: Star, batch: int, token_budget: int | None = None
) -> dict[str, Callable[[], Function]]:
    """UniSD* of the same rows by ours, the plain version and the bare limit.

    Each is built when it is called for.
    """
    chunk = default_chunk_tokens(base.config.vocab_size, base.device)
    options = ours.star_options(s, len(rows[0].auxiliary)) | {"token_budget": token_budget}
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
    """Measure a whole optimizer step without generation.

    SDFT against TRL; UniSD* at equal and at mixed lengths.
    """
    base, s, count = build(o.shape, o.device, o.dtype, o.layers), Star(), o.batch * o.accumulation
    V = base.config.vocab_size
    equal = examples(V, count, (o.prompt, o.prompt), (o.completion, o.completion))
    mixed = examples(V, count, (o.prompt // 2, o.prompt * 3), (max(o.completion // 8, 1), o.completion * 2))
    rows: Rows = []
    ratios: Ratios = {}
    for prefix, make, data in (
        ("sdft", sdft_steps, equal),
        ("star equal", partial(star_steps, token_budget=o.token_budget), equal),
        ("star", partial(star_steps, token_budget=o.token_budget), mixed),
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
                ratio(samples, f"sdft_{what}_vs_trl", one, "sdft trl full_logits", what, ratios)
                ratio(samples, f"sdft_{what}_vs_trl_topk", one, "sdft trl topk_logits", what, ratios)
        else:
            key = prefix.replace(" ", "_")
            for what in ("time", "extra_memory"):
                ratio(samples, f"{key}_{what}_vs_plain", one, f"{prefix} plain", what, ratios)
            ratio(samples, f"{key}_time_vs_limit", one, f"{prefix} limit", "time", ratios)
    return rows, ratios


def passed_tokens(data: Sequence[Example]) -> int:
    """Count the tokens that a UniSD* step passes through the model.

    Once without gradient under every view (the problem of the right reference is that of the wrong
    one), three times for the student (forward, forward again for checkpointing, backward with
    frozen weights).
    """
    return sum(
        sum(len(view) + len(row.completion) for view in (row.teacher, row.negative, *row.auxiliary))
        + 2 * len(row.student)
        + 3 * len(row.completion)
        for row in data
    )


def needed_flop(base: Any, data: Sequence[Example]) -> float:
    """Floating-point operations of these passes and of the products with the head.

    K + 4 of the latter for each completion token; without attention.
    """
    body = sum(p.numel() for name, p in base.get_decoder().named_parameters() if "embed" not in name)
    answers = sum(len(row.completion) * (len(row.auxiliary) + 4) for row in data)
    return 2.0 * (body * passed_tokens(data) + base.get_output_embeddings().weight.numel() * answers)
