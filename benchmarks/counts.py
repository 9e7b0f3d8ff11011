"""Count operations and waits of a UniSD* step at the row layout of the 0.5B one, without a device.

`python -m benchmarks.counts [--json F]`. Lengths are those of the measured step divided by `SCALE`,
and so are the tokens of a pass and of a chunk of the loss; the depth is the 0.5B model's, since an
adapter's weights are counted one by one. What is outside of the model's layers does not depend on
its width. The loss counts as it is computed without Triton, whose kernels take the place of some
twenty operations of each chunk.
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
PASS_TOKENS, CHUNK_TOKENS = 8192, 192  # an accelerator's, at a vocabulary of 151,936
PHASES = ("score", "student", "update")


def trainer(device: torch.device, layers: int = LAYERS) -> Any:
    """A run of two steps, the first of which has to set things up."""
    base = shapes.build("tiny", torch.device("cpu"), torch.float32, layers).to(device)
    lengths = [(least // SCALE, most // SCALE) for least, most in (PROMPTS, COMPLETIONS)]
    rows = shapes.examples(base.config.vocab_size, ROWS, *lengths, REFERENCE // SCALE)
    options = {
        "max_steps": 2,
        "gradient_checkpointing": False,  # it would count in the model alone
        "packing": "packed",
        "token_budget": PASS_TOKENS // SCALE,
        "dataloader_pin_memory": False,
    }
    return ours.trainer(
        base, rows, Star(), ours.star_options(Star(), len(rows[0].auxiliary)) | options, BATCH
    )


def losses_of(built: Any) -> list[float]:
    """The losses of its steps."""
    lines = (Path(built.args.output_dir) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["loss"] for line in lines]


def count(layers: int = LAYERS) -> dict[str, Any]:
    """Count the second step of a run on the device."""
    device, counting = register(), Counting()
    os.environ["ACCELERATE_TORCH_DEVICE"] = str(device)  # where trainers compute
    module = sys.modules.get("unisd.losses.chunked", sys.modules["unisd.losses"])  # in old commits
    vars(module)["default_chunk_tokens"] = lambda *_: CHUNK_TOKENS // SCALE
    with counting:
        built = trainer(device, layers)
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
    return {
        "operations": {phase: counting.operations[phase, "outside"] for phase in PHASES},
        "waits": {phase: counting.waits[phase, "outside"] for phase in PHASES},
        "operations_in_the_model": {phase: counting.operations[phase, "model"] for phase in PHASES},
        "waits_in_the_model": {phase: counting.waits[phase, "model"] for phase in PHASES},
        "losses": losses_of(built),
        "sites": [[n, *site] for site, n in counting.sites.most_common()],
        "wait_sites": [[n, *site] for site, n in counting.wait_sites.most_common()],
    }


def main(argv: list[str] | None = None) -> int:
    """Count, show, and write what was found."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.counts", description=__doc__)
    parser.add_argument("--json", type=Path, help="where the counts go")
    parser.add_argument("--layers", type=int, default=LAYERS, help="the model's depth")
    parser.add_argument("--sites", type=int, default=0, help="show so many places of each kind")
    args = parser.parse_args(argv)
    found = count(args.layers)
    if args.json is not None:
        args.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    for what in ("operations", "waits", "operations_in_the_model", "waits_in_the_model"):
        print(f"{what:<24} {sum(found[what].values()):6}   {found[what]}")
    for what in ("sites", "wait_sites"):
        for n, phase, site, name in found[what][: args.sites]:
            print(f"{n:6} {phase:<8} {site:<60} {name}")
    return 0


if __name__ == "__main__":
    status = 1
    try:
        status = main()
    except Exception:
        traceback.print_exc()
    sys.stdout.flush()
    os._exit(status)  # autograd's threads of such a device do not end by themselves
