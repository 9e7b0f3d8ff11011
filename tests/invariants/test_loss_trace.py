"""Twenty steps on a tiny model must give the losses they gave before: an optimisation changes time
and memory, nothing else.

A change that is *meant* to change the losses writes the file anew: `python
tests/invariants/test_loss_trace.py`.
"""

from __future__ import annotations

import json
import random
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig

from unisd import UniSDConfig, UniSDTrainer
from unisd import testing as tiny
from unisd.rollout.engine import Completion, NoiseKey, Sampling

TRACES = Path(__file__).parent / "traces" / "loss.json"
STEPS = 20
STAR: dict[str, Any] = {
    "teacher_model_kind": "ema",
    "teacher_update_rate": 0.1,
    "agreement": "token",
    "agreement_gamma": 1.0,
    "contrastive_weight": 0.1,
    "feature_weight": 0.1,
}
RUNS: dict[str, tuple[str, bool, dict[str, Any]]] = {
    "sdft": ("llama", False, {"teacher_model_kind": "ema", "teacher_update_rate": 0.1}),
    "star": ("qwen3", False, STAR | {"distillation_alpha": 0.5, "token_clip_quantile": 0.9}),
    "star-lora": ("llama", True, STAR | {"token_clip": 2.0, "packing": "packed"}),
}


class Written:
    """Completions that depend on nothing but the key: no rounding can make a sampled token, and all
    after it, another.
    """

    def sync(self) -> None:
        pass

    def generate(
        self, prompts: Sequence[Sequence[int]], keys: Sequence[NoiseKey] | None, sampling: Sampling
    ) -> list[Completion]:
        assert keys is not None
        written = []
        for key in keys:
            draw = random.Random(str(key))
            written.append(
                Completion(
                    [draw.randrange(6, 262) for _ in range(draw.randint(3, sampling.max_new_tokens))], False
                )
            )
        return written

    def sleep(self) -> None:
        pass


def losses(name: str, folder: str) -> list[float]:
    family, lora, options = RUNS[name]
    args = UniSDConfig(
        output_dir=folder,
        use_cpu=True,
        max_steps=STEPS,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_completion_length=12,
        learning_rate=2e-3,
        warmup_steps=0,
        disable_tqdm=True,
        logging_strategy="no",
        save_strategy="no",
        teacher_prompt_template="{prompt} Ref: {privileged_context}",
        auxiliary_prompt_template="{context} {prompt}",
        **options,
    )
    trainer = UniSDTrainer(
        tiny.model(family),
        args,
        train_dataset=tiny.rows(8),
        processing_class=tiny.tokenizer(),
        peft_config=LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.0) if lora else None,
        engine=Written(),
    )
    trainer.train()
    return [json.loads(line)["loss"] for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name == "star" else pytest.mark.long) for name in sorted(RUNS)]
)
def test_twenty_steps_give_the_recorded_losses(name: str, tmp_path: Path) -> None:
    recorded = json.loads(TRACES.read_text(encoding="utf-8"))[name]
    assert len(recorded) == STEPS and recorded[-1] != pytest.approx(recorded[0], rel=1e-2)  # it trained
    assert losses(name, str(tmp_path)) == pytest.approx(recorded, rel=1e-4)


if __name__ == "__main__":
    found = {}
    for run in sorted(RUNS):
        with tempfile.TemporaryDirectory() as scratch:
            found[run] = losses(run, scratch)
    TRACES.parent.mkdir(exist_ok=True)
    TRACES.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
