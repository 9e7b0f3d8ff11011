"""Count operations and waits of a UniSD* step at the row layout of the 0.5B one, without a device.

`python -m benchmarks.counts [--json F]`. Sizes are those of the measured step divided by `SCALE`,
with the budgets of a pass and of a chunk of the loss; its depth is the 0.5B model's, since adapters
are counted one by one. What is outside of the model's layers does not depend on a width.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from benchmarks import ours, shapes
from benchmarks.pretend_device import Counting, register
from benchmarks.settings import Star

SCALE = 16
LAYERS, ROWS, BATCH = 24, 16, 8
PROMPTS, COMPLETIONS, REFERENCE = (64, 384), (32, 512), 32
CHUNK_TOKENS = 192  # of the loss, at a vocabulary of 151,936 on an accelerator


def _scaled_chunks() -> None:
    from unisd import losses

    home = sys.modules.get("unisd.losses.chunked", losses)
    home.default_chunk_tokens = lambda *_: CHUNK_TOKENS // SCALE


def count(layers: int = LAYERS, cpu: bool = False) -> dict[str, Any]:
    """Count the second step of a run (the first one has to set things up)."""
    device = torch.device("cpu")
    if not cpu:
        device = register()
        os.environ["ACCELERATE_TORCH_DEVICE"] = str(device)  # where trainers compute
    counting = Counting()
    _scaled_chunks()
    base = shapes.build("tiny", torch.device("cpu"), torch.float32, layers)
    rows = shapes.examples(
        base.config.vocab_size,
        ROWS,
        (PROMPTS[0] // SCALE, PROMPTS[1] // SCALE),
        (COMPLETIONS[0] // SCALE, COMPLETIONS[1] // SCALE),
        REFERENCE // SCALE,
    )
    options = ours.star_options(Star(), len(rows[0].auxiliary)) | {
        "max_steps": 2,
        "gradient_checkpointing": False,
        "packing": "packed",
        "token_budget": 8192 // SCALE,
        "dataloader_pin_memory": False,
    }
    with counting:
        built = ours.trainer(base.to(device), rows, Star(), options, BATCH)
        counting.watch(built.backbone.decoder, built.accelerator)
        begin, finish = built.get_batch_samples, built.metrics.finish

        def get_batch_samples(*args: Any, **kwargs: Any) -> Any:
            counting.active, counting.phase = built.state.global_step == 1, "score"
            return begin(*args, **kwargs)

        def finished(*args: Any, **kwargs: Any) -> Any:
            values = finish(*args, **kwargs)
            counting.active = False
            return values

        built.get_batch_samples, built.metrics.finish = get_batch_samples, finished
        register_optimizer_step_pre_hook(lambda *_: setattr(counting, "phase", "update"))
        built.train()
    lines = (Path(built.args.output_dir) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    phases = ("score", "student", "update")
    return {
        "operations": {phase: counting.operations[phase, "outside"] for phase in phases},
        "operations_of_the_model": sum(counting.operations[phase, "model"] for phase in phases),
        "waits": {phase: counting.waits[phase, "outside"] for phase in phases},
        "waits_in_the_model": {phase: counting.waits[phase, "model"] for phase in phases},
        "losses": [json.loads(line)["loss"] for line in lines],
        "sites": [[n, *site] for site, n in counting.sites.most_common()],
        "wait_sites": [[n, *site] for site, n in counting.wait_sites.most_common()],
    }


def main(argv: list[str] | None = None) -> int:
    """Count, show, and write what was found."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.counts", description=__doc__)
    parser.add_argument("--json", type=Path, help="where the counts go")
    parser.add_argument("--layers", type=int, default=LAYERS)
    parser.add_argument("--sites", type=int, default=0, help="show so many places of each kind")
    parser.add_argument("--cpu", action="store_true", help="the same run on the CPU, to compare its losses")
    args = parser.parse_args(argv)
    found = count(args.layers, args.cpu)
    if args.json is not None:
        args.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    for what in ("operations", "waits", "waits_in_the_model"):
        print(f"{what:<20} {sum(found[what].values()):6}   {found[what]}")
    print("of the model", found["operations_of_the_model"], "losses", found["losses"])
    for what in ("sites", "wait_sites"):
        for n, phase, site, name in found[what][: args.sites]:
            print(f"{n:6} {phase:<8} {site:<60} {name}")
    return 0


if __name__ == "__main__":
    try:
        status = main()
    except Exception:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    os._exit(status)  # autograd's threads of the pretended device do not end by themselves
