"""One process of `python -m benchmarks run`: the SDFT job by ours or by TRL, timed by phase.

It imports nothing before the side that it measures does: imports are a part.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class Clock:
    """Wall and CPU seconds of this process by phase, from its start."""

    def __init__(self, started: float) -> None:
        self.started = started
        self.wall: dict[str, float] = {}
        self.cpu: dict[str, float] = {}

    def imported(self) -> None:
        """All from the start of the process to here was imports."""
        self.wall["import"] = time.perf_counter() - self.started
        self.cpu["import"] = time.process_time()

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        wall, cpu = time.perf_counter(), time.process_time()
        try:
            yield
        finally:
            self.wall[phase] = self.wall.get(phase, 0.0) + time.perf_counter() - wall
            self.cpu[phase] = self.cpu.get(phase, 0.0) + time.process_time() - cpu

    def around(self, phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            with self.timed(phase):
                return function(*args, **kwargs)

        return call

    def settle(self) -> None:
        """What is left of training beside rollouts and scores is the update."""
        for seconds in (self.wall, self.cpu):
            seconds["update"] = seconds.pop("train") - seconds["rollout"] - seconds["score"]


def ours(job: dict[str, Any], output: str, clock: Clock, mode: str = "") -> int:
    """`unisd train`, as it is typed; returns the new tokens.

    mode: "default" leaves gradient checkpointing as it is by default, off; TRL's is on.
    """
    from unisd.cli.main import main
    from unisd.monitoring.metrics import StepMetrics
    from unisd.run import train as run

    timed = StepMetrics.timed

    @contextmanager
    def timed_too(metrics: StepMetrics, phase: str) -> Iterator[None]:
        counted = phase if phase in ("rollout", "score") else "inside"
        with clock.timed(counted), timed(metrics, phase):
            yield

    def begun(*args: Any, **kwargs: Any) -> Any:
        clock.imported()
        return run_train(*args, **kwargs)

    run_train = run.train
    run.train = begun
    run.set_up = clock.around("load", run.set_up)
    run._trained = clock.around("train", run._trained)
    run._save_model = clock.around("save", run._save_model)
    StepMetrics.timed = timed_too  # type: ignore[method-assign]
    if code := main(["train", *flags(job, output), *(() if mode else ("--gradient_checkpointing",))]):
        sys.exit(code)
    for seconds in (clock.wall, clock.cpu):
        seconds.pop("inside", None)
    results = json.loads((Path(output) / "results.json").read_text(encoding="utf-8"))
    return int(results["cost"]["tokens"]["generated"])


def flags(job: dict[str, Any], output: str) -> list[str]:
    """What a user types who wants no evaluation and no records."""
    words = {
        "recipe": "sdft", "model": job["folder"], "output_dir": output, "dtype": "float32",
        "use_peft": True, "lora_dropout": 0, "train_file": job["rows"], "eval_file": job["evaluated"],
        "retention": "none", "answers_kept": 0, "diagnostics": False, "alarms": "off",
        "record_samples": 0, "logging_strategy": "no", "save_strategy": "no", "max_steps": job["steps"],
        "per_device_train_batch_size": job["batch"],
        "gradient_accumulation_steps": job["accumulation"],
        "max_completion_length": job["completion"],
        "teacher_prompt_template": job["teacher_template"], "distillation_alpha": job["alpha"],
        "temperature": job["temperature"], "teacher_update_rate": job["ema_rate"],
        "learning_rate": job["learning_rate"], "lr_scheduler_type": "constant", "warmup_steps": 0,
        "use_cpu": True, "disable_tqdm": True,
    }  # fmt: skip
    return [word for name, value in words.items() for word in (f"--{name}", str(value))]


def trl_settings(job: dict[str, Any], output: str, mode: str) -> Any:
    """What is not TRL's default: the job, and that nothing is logged or saved on the way."""
    from trl.experimental.sdft import SDFTConfig

    return SDFTConfig(
        output_dir=output,
        model_init_kwargs={"dtype": "float32"},
        use_cpu=True,
        bf16=False,  # its default, which a CPU without bf16 emulates
        max_steps=job["steps"],
        per_device_train_batch_size=job["batch"],
        gradient_accumulation_steps=job["accumulation"],
        num_generations=1,
        max_completion_length=job["completion"],
        temperature=job["temperature"],
        learning_rate=job["learning_rate"],
        lr_scheduler_type="constant",
        distillation_mode=mode,
        distillation_alpha=job["alpha"],
        teacher_model_kind="ema",
        teacher_update_rate=job["ema_rate"],
        teacher_prompt_template=job["teacher_template"],
        logging_strategy="no",
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )


def trl(job: dict[str, Any], output: str, clock: Clock, mode: str = "full_logits") -> int:
    """A script with TRL's trainer, as its documentation writes it; returns the new tokens."""
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoTokenizer
    from trl.experimental.sdft import SDFTTrainer

    clock.imported()
    with clock.timed("load"):
        with Path(job["rows"]).open(encoding="utf-8") as file:
            rows = Dataset.from_list([json.loads(line) for line in file])
        args = trl_settings(job, output, mode)
        adapter = LoraConfig(
            r=64, lora_alpha=128, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM"
        )
        # It must have an end token: one that the model has no row for, so that it never comes.
        tokenizer = AutoTokenizer.from_pretrained(job["folder"], padding_side="left", eos_token="<never>")
        trainer = SDFTTrainer(
            job["folder"], args, train_dataset=rows, processing_class=tokenizer, peft_config=adapter
        )

    written: list[int] = []
    generate, forward = trainer._generate, trainer._forward_logits

    def counted(prompts: Any) -> Any:
        found = generate(prompts)
        written.extend(map(len, found[1]))
        return found

    def scored(*args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled():
            return forward(*args, **kwargs)
        with clock.timed("score"):
            return forward(*args, **kwargs)

    trainer._generate, trainer._forward_logits = clock.around("rollout", counted), scored
    clock.around("train", trainer.train)()
    clock.around("save", trainer.save_model)(output)
    return sum(written)


def main(side: str, told: str, output: str, started: str) -> None:
    """Carry out the job of the file `told`; what was found lies beside it."""
    clock = Clock(float(started))
    job = json.loads(Path(told).read_text(encoding="utf-8"))
    name, _, mode = side.partition(" ")
    carry_out = ours if name == "ours" else trl
    tokens = carry_out(job, output, clock, *([mode] if mode else ()))
    clock.settle()
    from benchmarks.measure import status_mb

    found = {
        "wall_s": clock.wall,
        "cpu_s": clock.cpu,
        "tokens": tokens,
        "peak_memory_mb": status_mb("VmHWM"),
    }
    (Path(told).parent / "found.json").write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
