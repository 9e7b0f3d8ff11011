"""The memory table of docs/scale.md: `unisd.memory.estimate` for published model shapes.

Arithmetic, not measurement.

python benchmarks/memory_table.py
"""

from __future__ import annotations

from unisd.config import UniSDConfig
from unisd.console import markdown_table
from unisd.memory import ModelSize, estimate

# name: (parameters, hidden, layers, MLP, key/value width, vocabulary), from the models' published
# configurations
SHAPES = {
    "Qwen2.5-0.5B": (494_032_768, 896, 24, 4864, 128, 151_936),
    "Qwen2.5-1.5B": (1_543_714_304, 1536, 28, 8960, 256, 151_936),
    "Qwen2.5-3B": (3_085_938_688, 2048, 36, 11_008, 256, 151_936),
    "Qwen2.5-7B": (7_615_616_512, 3584, 28, 18_944, 512, 152_064),
}
RANK = 64


def adapter(hidden: int, layers: int, mlp: int, kv: int) -> int:
    """Parameters of LoRA on all linear layers."""
    maps = [
        (hidden, hidden),
        (hidden, kv),
        (hidden, kv),
        (hidden, hidden),
        (hidden, mlp),
        (hidden, mlp),
        (mlp, hidden),
    ]
    return layers * RANK * sum(a + b for a, b in maps)


def main() -> None:
    config = UniSDConfig(teacher_model_kind="ema", max_completion_length=512, gradient_checkpointing=True)
    config.bf16 = True
    lines = []
    for name, (parameters, hidden, layers, mlp, kv, vocabulary) in SHAPES.items():
        trained = adapter(hidden, layers, mlp, kv)
        sizes = [
            ModelSize(parameters, parameters, 4.0, 4.0, hidden, layers, vocabulary, mlp, kv),
            ModelSize(parameters + trained, trained, 2.0, 4.0, hidden, layers, vocabulary, mlp, kv),
            ModelSize(parameters + trained, trained, 0.56, 4.0, hidden, layers, vocabulary, mlp, kv),
        ]
        totals = [estimate(size, config, 512)["total"] for size in sizes]
        totals.insert(1, estimate(sizes[0], config, 512, shards=8)["total"])
        totals.insert(3, estimate(sizes[1], config, 512, shards=8)["total"])
        lines.append([name, *(f"{total / 2**30:.1f} GiB" for total in totals)])
    full, lora = "full fine-tuning, float32 weights", "LoRA r 64, bfloat16 base"
    header = (
        "model",
        full,
        "the same, FSDP2 over 8",
        lora,
        "the same, FSDP2 over 8",
        "LoRA r 64, 4-bit base",
    )
    print("\n".join(markdown_table(header, lines)))


if __name__ == "__main__":
    main()
