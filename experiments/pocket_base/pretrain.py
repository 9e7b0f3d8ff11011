"""Train the pocket base model from scratch.

`python -m experiments.pocket_base.pretrain --output_dir out [--seed 0] [--resume]`.

`--variant hedging` trains the shipped base on, for some minutes, into one that doubts aloud
(:mod:`experiments.pocket_base.hedging`).

Every batch is a function of (seed, step), so a resumed run sees what the uninterrupted one would
have seen. Documents are packed into rows with a block-diagonal mask; all tokens carry loss, those
of prompts much less than those of replies.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from experiments.pocket_base.documents import Document, DocumentSampler
from experiments.pocket_base.hedging import HedgingSampler
from experiments.pocket_base.tokenizer import ASSISTANT, BOS, EOS, train_tokenizer
from unisd.pocket import BASE_DIR
from unisd.pocket.world import World, make_word, make_world

ROWS, LENGTH = 16, 256
STEPS = 2200
FILL = 0.94  # share of a batch that is aimed at; more would drop long documents that no row can take
PROMPT_WEIGHT = 0.1
MUON_LR, ADAM_LR, WARMUP, DECAY = 7e-3, 5e-3, 40, 0.7
# For some time a fifth of the tokens repeats random ones, later all documents are copying drills.
# Without these a model of this size copies names, but hardly digits and letters: the heads that
# look back form then, and all four skills follow.
REPEAT_STEPS, REPEATS = range(500, 800), 0.2
DRILL_STEPS = range(1000, 1100)
SAVE_EVERY = 40
STATE = "training_state.pt"

Batch = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Variant:
    """What a model is trained on, and from where. `scale`: of the learning rates."""

    sampler: Callable[..., DocumentSampler]
    steps: int
    scale: float
    start: Path | None


VARIANTS = {
    "base": Variant(DocumentSampler, STEPS, 1.0, None),
    "hedging": Variant(HedgingSampler, 120, 0.3, BASE_DIR),
}


def model_config(tokenizer: PreTrainedTokenizerFast) -> Qwen3Config:
    return Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=32,
        initializer_range=0.05,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def tokenizer_texts(seed: int, documents: int = 6000) -> Iterator[str]:
    """Yield documents, and the syllables of nonsense words in bulk.

    Each syllable becomes one token, whatever word it stands in.
    """
    rng = random.Random(f"tokenizer {seed}")
    sampler = DocumentSampler(make_world(), rng)
    for _ in range(documents):
        yield "\n".join(message["content"] for message in sampler.sample().messages)
    for _ in range(400):
        word = make_word(rng)
        for consonant in "bdfgklmnprstvz":
            for vowel in "aeiou":
                yield f" {consonant}{vowel}"
                yield "\n".join([consonant + vowel] * 8)
        yield word


def encode(tokenizer: PreTrainedTokenizerFast, document: Document) -> tuple[list[int], int]:
    """Token ids, and how many of them are the prompt.

    Same as the chat template (a test compares them).
    """
    prompt = (
        BOS + "".join(f"<|{m['role']}|>{m['content']}{EOS}\n" for m in document.messages[:-1]) + ASSISTANT
    )
    head = tokenizer.encode(prompt, add_special_tokens=False)
    reply = tokenizer.encode(document.messages[-1]["content"] + EOS, add_special_tokens=False)
    return head + reply, len(head)


def repeated_tokens(rng: random.Random, tokenizer: PreTrainedTokenizerFast) -> tuple[list[int], int]:
    """Random tokens, twice: nothing but looking back helps with the second half.

    Short signs are as frequent as all else.
    """
    signs = tokenizer.convert_tokens_to_ids([*"0123456789ABCDFGHKLMNPRSTVWXZ"])
    tokens = [
        rng.choice(signs) if rng.random() < 0.4 else rng.randrange(6, len(tokenizer))
        for _ in range(rng.randint(8, 40))
    ]
    return [tokenizer.bos_token_id, *tokens, *tokens], 1 + len(tokens)


def make_batch(sampler: DocumentSampler, tokenizer: PreTrainedTokenizerFast, repeats: float = 0.0) -> Batch:
    """First-fit packing, longest first, into [ROWS, LENGTH].

    `repeats`: share of tokens that repeat random ones.
    """
    documents: list[tuple[list[int], int]] = []
    total = 0
    while total < repeats * ROWS * LENGTH:
        documents.append(repeated_tokens(sampler.rng, tokenizer))
        total += len(documents[-1][0])
    random_ids = {id(ids) for ids, _ in documents}
    while total < FILL * ROWS * LENGTH:
        ids, start = encode(tokenizer, sampler.sample())
        if len(ids) <= LENGTH:
            documents.append((ids, start))
            total += len(ids)
    documents.sort(key=lambda pair: -len(pair[0]))
    ids_NT = torch.zeros(ROWS, LENGTH, dtype=torch.long)
    position_NT = torch.zeros(ROWS, LENGTH, dtype=torch.long)
    document_NT = torch.full((ROWS, LENGTH), -1)
    weight_NT = torch.zeros(ROWS, LENGTH)
    used = [0] * ROWS
    for number, (ids, start) in enumerate(documents):
        row = next((r for r in range(ROWS) if used[r] + len(ids) <= LENGTH), None)
        if row is None:
            continue
        left, right = used[row], used[row] + len(ids)
        ids_NT[row, left:right] = torch.tensor(ids)
        position_NT[row, left:right] = torch.arange(len(ids))
        document_NT[row, left:right] = number
        # weight_NT[t] belongs to the prediction of token t + 1
        weight_NT[row, left : left + start - 1] = 0.0 if id(ids) in random_ids else PROMPT_WEIGHT
        weight_NT[row, left + start - 1 : right - 1] = 1.0
        used[row] = right
    same = document_NT[:, :, None] == document_NT[:, None, :]
    mask = same & torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
    return {"ids": ids_NT, "positions": position_NT, "weights": weight_NT, "mask": mask[:, None]}


def document_sampler(
    world: World, seed: int, step: int, kind: Callable[..., DocumentSampler]
) -> DocumentSampler:
    rng = random.Random(f"{seed} {step}")
    return kind(world, rng, drills=1.0) if step in DRILL_STEPS else kind(world, rng)


def loss_of(model: Any, batch: Batch) -> torch.Tensor:
    logits = model(
        input_ids=batch["ids"], position_ids=batch["positions"], attention_mask=batch["mask"], use_cache=False
    ).logits
    token_loss = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), batch["ids"][:, 1:].flatten(), reduction="none"
    )
    weights = batch["weights"][:, :-1].flatten()
    return (token_loss * weights).sum() / weights.sum()


class Muon(torch.optim.Optimizer):
    """Makes momentum orthogonal, for matrices.

    torch's own does this in bf16, which many CPUs only emulate.
    """

    def __init__(
        self, params: list[torch.nn.Parameter], lr: float, momentum: float = 0.95, decay: float = 0.05
    ):
        super().__init__(params, {"lr": lr, "momentum": momentum, "decay": decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[tuple[torch.nn.Parameter, torch.Tensor]]] = {}
            for p in group["params"]:
                buffer = self.state[p].setdefault("momentum", torch.zeros_like(p))
                buffer.lerp_(p.grad, 1 - group["momentum"])
                nesterov = p.grad.lerp(buffer, group["momentum"])
                tall = p.shape[0] > p.shape[1]
                by_shape.setdefault(p.shape, []).append((p, nesterov.T if tall else nesterov))
            for shape, pairs in by_shape.items():
                updates = orthogonalize(torch.stack([update for _, update in pairs]))
                # 0.2 * sqrt(larger side) gives the update the size AdamW's would have
                step_size = group["lr"] * 0.2 * max(shape) ** 0.5
                for (p, _), update in zip(pairs, updates, strict=True):
                    p.mul_(1 - group["lr"] * group["decay"])
                    p.sub_(update.T if shape[0] > shape[1] else update, alpha=step_size)


def orthogonalize(x_NIJ: torch.Tensor, iterations: int = 5) -> torch.Tensor:
    """Drive every singular value towards one, by Newton-Schulz.

    The coefficients are those of the quintic iteration of Muon.
    """
    x_NIJ = x_NIJ / (x_NIJ.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(iterations):
        gram_NII = x_NIJ @ x_NIJ.mT
        x_NIJ = 3.4445 * x_NIJ + (-4.7750 * gram_NII + 2.0315 * gram_NII @ gram_NII) @ x_NIJ
    return x_NIJ


def make_optimizers(model: Qwen3ForCausalLM) -> list[torch.optim.Optimizer]:
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    return [
        Muon(matrices, lr=MUON_LR),
        torch.optim.AdamW(others, lr=ADAM_LR, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def rate(step: int, steps: int) -> float:
    """Warm up, hold, then decay linearly to zero."""
    return min(1.0, (step + 1) / WARMUP, (steps - step) / (DECAY * steps))


@dataclass
class Training:
    """What a training that is stopped needs to go on."""

    model: Qwen3ForCausalLM
    tokenizer: PreTrainedTokenizerFast
    optimizers: list[torch.optim.Optimizer]
    step: int = 0
    seconds: float = 0.0

    def restore(self, file: Path) -> None:
        """Read weights, optimizers, step and time."""
        state = torch.load(file)
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.step, self.seconds = state["step"], state["seconds"]

    def store(self, file: Path) -> None:
        """Write the same; a kill never leaves half a file."""
        state = {
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "step": self.step,
            "seconds": self.seconds,
        }
        torch.save(state, file.with_suffix(".tmp"))
        file.with_suffix(".tmp").replace(file)


def begin(chosen: Variant, output_dir: Path, seed: int, resume: bool) -> Training:
    """Make model, tokenizer and optimizers of a variant, or read those of a stopped training."""
    torch.manual_seed(seed)
    if resume or chosen.start is not None:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(output_dir if resume else chosen.start)
    else:
        tokenizer = train_tokenizer(tokenizer_texts(seed))
    if chosen.start is None:
        model = Qwen3ForCausalLM(model_config(tokenizer))
    else:
        model = Qwen3ForCausalLM.from_pretrained(chosen.start, dtype=torch.float32).train()
    run = Training(model, tokenizer, make_optimizers(model))
    if resume:
        run.restore(output_dir / STATE)
    return run


def compiled(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast) -> Any:
    """Compile the forward pass, where that works here."""
    try:
        forward: Any = torch.compile(model)
        warm_up: Any = loss_of(
            forward, make_batch(DocumentSampler(make_world(), random.Random(0)), tokenizer)
        )
        warm_up.backward()
        model.zero_grad()
    except Exception:  # no working C++ compiler: eager is only slower
        return model
    return forward


def take_step(run: Training, forward: Any, batch: Batch, rates: list[float]) -> float:
    """Change the weights by one batch, with a learning rate per optimizer; returns the loss."""
    loss: Any = loss_of(forward, batch)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(run.model.parameters(), 1.0)
    for optimizer, rate_now in zip(run.optimizers, rates, strict=True):
        for group in optimizer.param_groups:
            group["lr"] = rate_now
        optimizer.step()
        optimizer.zero_grad()
    return float(loss.item())


def pretrain(
    output_dir: Path,
    seed: int = 0,
    steps: int | None = None,
    resume: bool = False,
    compile: bool = True,
    variant: str = "base",
) -> None:
    """Train a variant into `output_dir`, with a checkpoint every `SAVE_EVERY` steps."""
    chosen = VARIANTS[variant]
    steps = steps or chosen.steps
    output_dir.mkdir(parents=True, exist_ok=True)
    run = begin(chosen, output_dir, seed, resume and (output_dir / STATE).exists())
    forward = compiled(run.model, run.tokenizer) if compile else run.model
    world, log_file = make_world(), output_dir / "log.json"
    log: list[dict[str, float]] = json.loads(log_file.read_text()) if run.step else []
    log = [entry for entry in log if entry["step"] < run.step]
    columns = (
        TextColumn("pretraining"),
        BarColumn(),
        TextColumn("{task.fields[note]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns) as progress:
        bar = progress.add_task("", total=steps, completed=run.step, note="")
        for step in range(run.step, steps):
            start = time.perf_counter()
            sampler = document_sampler(world, seed, step, chosen.sampler)
            batch = make_batch(sampler, run.tokenizer, REPEATS if step in REPEAT_STEPS else 0.0)
            rates = [chosen.scale * peak * rate(step, steps) for peak in (MUON_LR, ADAM_LR)]
            loss = take_step(run, forward, batch, rates)
            run.step, run.seconds = step + 1, run.seconds + time.perf_counter() - start
            if step % 20 == 0:
                log.append({"step": step, "loss": round(loss, 4), "seconds": round(run.seconds, 1)})
                log_file.write_text(json.dumps(log))
            progress.update(bar, completed=run.step, note=f"loss {loss:.3f}")
            if run.step % SAVE_EVERY == 0 or run.step == steps:
                run.store(output_dir / STATE)
                save(run.model, run.tokenizer, output_dir)
    print(f"{steps} steps in {run.seconds / 60:.1f} minutes -> {output_dir}")


def save(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, output_dir: Path) -> None:
    """Weights rounded to bf16, which is what ships."""
    weights = {name: tensor.to(torch.bfloat16) for name, tensor in model.state_dict().items()}
    copy = Qwen3ForCausalLM(model.config).to(torch.bfloat16)
    copy.load_state_dict(weights)
    copy.generation_config.eos_token_id = tokenizer.eos_token_id
    copy.generation_config.pad_token_id = tokenizer.pad_token_id
    copy.save_pretrained(output_dir)
    tokenizer.save_pretrained(output_dir)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--variant", choices=list(VARIANTS), default="base")
    parser.add_argument("--steps", type=int, help="default: those of the variant")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in output_dir")
    parser.add_argument("--no_compile", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    pretrain(args.output_dir, args.seed, args.steps, args.resume, not args.no_compile, args.variant)


if __name__ == "__main__":
    main()
