"""Run vLLM in the harness: the trainer's own colocated engine.

It is asked for the same prompts and lengths.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from accelerate import Accelerator

from benchmarks.settings import scratch_folder
from benchmarks.shapes import EOS
from unisd import UniSDConfig


def writer(
    model: Any, prompts: Sequence[Sequence[int]], lengths: Sequence[int]
) -> tuple[Callable[[], float], Callable[[], float]]:
    """Return two functions, one that writes and one that syncs.

    One writes `lengths[i]` tokens after each prompt, greedily, with their log-probabilities as in a
    run, and returns how many; the other takes over the model's weights anew, as in each step of a
    run, and returns the seconds.
    """
    from vllm import SamplingParams

    from unisd.rollout.vllm.colocated import ColocatedEngine

    longest = max(len(prompt) + length for prompt, length in zip(prompts, lengths, strict=True))
    args = UniSDConfig(
        output_dir=scratch_folder(),
        use_cpu=model.device.type == "cpu",
        use_vllm=True,
        vllm_gpu_memory_utilization=0.1,
        vllm_max_model_length=longest + 1,
    )
    accelerator = Accelerator(cpu=model.device.type == "cpu")
    engine = ColocatedEngine(args, model, accelerator, [EOS], lambda: 0)
    requests = [
        SamplingParams(max_tokens=n, ignore_eos=True, temperature=0.0, logprobs=0, detokenize=False)
        for n in lengths
    ]

    def write() -> float:
        engine.llm.reset_prefix_cache()  # prompts must be read again, as after new weights
        outputs = engine.llm.generate(
            [{"prompt_token_ids": list(p)} for p in prompts], requests, use_tqdm=False
        )
        return float(sum(len(output.outputs[0].token_ids) for output in outputs))

    def sync() -> float:
        start = time.perf_counter()
        engine.sync()
        return time.perf_counter() - start

    return write, sync
