"""Watch memory, open files and threads over many optimizer steps: they must not grow.

The pocket model is trained by

    python benchmarks/soak.py --steps 2000

Small steps (4 rows of UniSD*), a checkpoint every 100. Prints a line every `--every` steps, and
ends with exit code 1 if memory grew by more than 5 % after the warm-up (a tenth of the steps), or
if there are more open files or threads at the end than after it.
"""

from __future__ import annotations

import argparse
import gc
import sys
import tempfile
from typing import Any

import psutil
from transformers import TrainerCallback

from unisd.console import make_console, quiet_libraries
from unisd.run.inputs import load_data
from unisd.run.resolve import parse
from unisd.run.train import set_up


class Watch(TrainerCallback):
    """Resident memory in MiB, open files and threads of this process."""

    def __init__(self, every: int) -> None:
        self.every = every
        self.process = psutil.Process()
        self.seen: list[tuple[int, float, int, int]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % self.every:
            return
        gc.collect()
        line = (
            state.global_step,
            self.process.memory_info().rss / 2**20,
            self.process.num_fds(),
            self.process.num_threads(),
        )
        self.seen.append(line)
        print("step {}: {:.1f} MiB, {} open files, {} threads".format(*line), flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--every", type=int, default=50)
    asked = parser.parse_args()
    quiet_libraries()
    with tempfile.TemporaryDirectory() as folder:
        flags = (
            f"--max_steps {asked.steps} --output_dir {folder} --per_device_train_batch_size 4"
            " --gradient_accumulation_steps 1"
        )
        options, config = parse(
            [*flags.split(), "--save_strategy", "steps", "--save_steps", "100", "--save_total_limit", "2"]
        )
        setting = set_up(options, config, load_data(options, config.seed), make_console())
        watch = Watch(asked.every)
        setting.trainer.add_callback(watch)
        setting.trainer.train()
    warm = [line for line in watch.seen if line[0] >= asked.steps / 10]
    if len(warm) < 2:
        print("too few steps for a verdict: raise --steps or lower --every")
        return 1
    first, last = warm[0], warm[-1]
    growth = last[1] / first[1] - 1
    print(
        f"after warm-up: memory {growth:+.1%}, open files {last[2] - first[2]:+d}, threads"
        f" {last[3] - first[3]:+d}"
    )
    return int(growth > 0.05 or last[2] > first[2] or last[3] > first[3])


if __name__ == "__main__":
    sys.exit(main())
