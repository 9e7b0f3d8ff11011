"""Watch memory, open files and threads over many optimizer steps: they must not grow.

The pocket model is trained on prompts of mixed lengths by

    python -m benchmarks.soak --json benchmarks/results/soak.json --output docs/results/soak.svg

Small steps (2 rows of UniSD*, each behind up to 5 others), a checkpoint every 100. Prints a line
every `--every` steps, and ends with exit code 1 if memory grew by more than 5 % after the warm-up
(a tenth of the steps), or if there are more open files or threads at the end than after it.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import TrainerCallback

from benchmarks.measure import machine, versions
from unisd.console import make_console, quiet_libraries
from unisd.data.rows import Row
from unisd.run.inputs import load_data
from unisd.run.resolve import parse
from unisd.run.train import set_up

COLUMNS = ("step", "memory_mib", "open_files", "threads", "prompt_tokens")
LONGEST = 6  # problems in a prompt


class Watch(TrainerCallback):
    """Resident memory in MiB, open files and threads of this process, and how long prompts were."""

    def __init__(self, every: int) -> None:
        self.every = every
        self.process = psutil.Process()
        self.trainer: Any = None
        self.seen: list[tuple[int, float, int, int, int]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % self.every:
            return
        gc.collect()
        line = (
            state.global_step,
            self.process.memory_info().rss / 2**20,
            self.process.num_fds(),
            self.process.num_threads(),
            self.trainer.completions.prefilled,
        )
        self.seen.append(line)
        said = "step {}: {:.1f} MiB, {} open files, {} threads, {} prompt tokens so far"
        print(said.format(*line), flush=True)


def lengthened(rows: list[Row]) -> list[Row]:
    """The same problems, each behind up to `LONGEST` - 1 others."""
    texts = [row["prompt"] for row in rows]
    return [
        row | {"prompt": " ".join([*texts[max(i - i % LONGEST, 0) : i], row["prompt"]])}
        for i, row in enumerate(rows)
    ]


def grown(seen: list[tuple[int, float, int, int, int]], steps: int) -> dict[str, float] | None:
    """What was added after the warm-up; None: too little was seen."""
    warm = [line for line in seen if line[0] >= steps / 10]
    if len(warm) < 2:
        return None
    first, last = warm[0], warm[-1]
    highest = max(line[1] for line in warm)
    return {
        "memory": last[1] / first[1] - 1,
        "highest_memory": highest / first[1] - 1,
        "open_files": last[2] - first[2],
        "threads": last[3] - first[3],
    }


def plot(seen: list[tuple[int, float, int, int, int]], file: Path) -> None:
    """Memory by step, as SVG."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    with pyplot.rc_context({"svg.hashsalt": "soak", "svg.fonttype": "none"}):
        figure, axis = pyplot.subplots(figsize=(7, 3))
        axis.plot([line[0] for line in seen], [line[1] for line in seen])
        axis.set(xlabel="optimizer step", ylabel="resident memory (MiB)", ylim=(0, None))
        figure.tight_layout()
        file.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(file, format="svg", metadata={"Date": None})
        pyplot.close(figure)


def trained(steps: int, every: int) -> Watch:
    """Train the pocket on mixed lengths, and watch."""
    watch = Watch(every)
    with tempfile.TemporaryDirectory() as folder:
        flags = (
            f"--max_steps {steps} --output_dir {folder} --per_device_train_batch_size 2"
            " --gradient_accumulation_steps 1 --max_completion_length 32"
            " --save_strategy steps --save_steps 100 --save_total_limit 2"
        )
        options, config = parse(flags.split())
        data = load_data(options, config.seed)
        data.train = lengthened(data.train)
        setting = set_up(options, config, data, make_console())
        watch.trainer = setting.trainer
        setting.trainer.add_callback(watch)
        setting.trainer.train()
    return watch


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--every", type=int, default=50)
    parser.add_argument("--json", type=Path, help="where the result goes; unset: it is only shown")
    parser.add_argument("--output", type=Path, help="where a picture of the memory goes (SVG)")
    asked = parser.parse_args(argv)
    quiet_libraries()
    start = time.perf_counter()
    seen = trained(asked.steps, asked.every).seen
    growth = grown(seen, asked.steps)
    if growth is None:
        print("too few steps for a verdict: raise --steps or lower --every")
        return 1
    if asked.json is not None:
        result = {
            "bench": "soak", "machine": machine(torch.device("cpu")), "versions": versions(),
            "steps": asked.steps, "seconds": time.perf_counter() - start, "cpu_s": time.process_time(),
            "growth": growth,
            "seen": [dict(zip(COLUMNS, line, strict=True)) for line in seen],
        }  # fmt: skip
        asked.json.parent.mkdir(parents=True, exist_ok=True)
        asked.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if asked.output is not None:
        plot(seen, asked.output)
    print(
        f"after warm-up: memory {growth['memory']:+.1%} (at most {growth['highest_memory']:+.1%}),"
        f" open files {growth['open_files']:+d}, threads {growth['threads']:+d}"
    )
    return int(growth["highest_memory"] > 0.05 or growth["open_files"] > 0 or growth["threads"] > 0)


if __name__ == "__main__":
    sys.exit(main())
