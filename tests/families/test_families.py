"""Every family of models through all that a run does, against transformers and the method's page.

One cell is one family and one thing done with it. `UNISD_FAMILIES=FILE.jsonl` appends each cell's
outcome to a store, of which `python -m experiments.families` makes docs/models.md.
"""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file

from tests.families.cells import cells
from tests.families.zoo import FAMILIES, build
from tests.helpers.engines import ByKey
from tests.helpers.steps import STAR, assert_same
from tests.invariants.test_reference import apart, by_reference, by_trainer
from unisd import reference
from unisd import testing as tiny
from unisd.cli.main import main
from unisd.testing import trainer

SUBPROCESS = ("qwen3-moe", "gemma3-vision", "gpt-neox")
EMA = {"teacher_model_kind": "ema", "teacher_update_rate": 0.2}
RATE = 0.05

every = cells()
kinds = pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])


def written(step: int, row: int) -> list[int]:
    generator = torch.Generator().manual_seed(1000 * step + row)
    length = int(torch.randint(1, 10, (), generator=generator))
    return torch.randint(16, 256, (length,), generator=generator).tolist()


def adapter() -> LoraConfig:
    return LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")


def made(folder: Path, family: str, lora: bool = False, **options: Any) -> Any:
    """A trainer of UniSD* on a family's tiny model, by plain SGD."""
    model, tokenizer = build(family)
    given = {
        **STAR, **EMA, "optim": "sgd", "learning_rate": RATE, "max_grad_norm": 0.0, "max_steps": 2,
        "packing": "padded", "model": model, "processing_class": tokenizer,
        "engine": ByKey(lambda key: written(*key[1:3])),
        "peft_config": adapter() if lora else None,
    }  # fmt: skip
    return trainer(folder, **{**given, **options})


@every
@kinds
def test_reference(tmp_path: Path, family: str, lora: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunked loss, plain loss and the method's page take the same steps."""
    monkeypatch.setattr("tests.invariants.test_reference.written", written)
    found = []
    for loss in ("chunked", "plain"):
        built = made(tmp_path / loss, family, lora, loss_implementation=loss)
        start, model = reference.initial_teacher(built.model), copy.deepcopy(built.model)
        found.append(by_trainer(built))
    theirs = by_reference(built, model, 2)
    most = 2e-4 if family == "qwen3.5-vision" else 1e-4  # its linear attention: 1.1e-4 on a Xeon
    for ours in found:
        off = apart(ours, theirs, start)
        assert max(off.values()) < most, off
    assert any((found[0][1][key] != start[key]).any() for key in start)


@every
def test_layouts(tmp_path: Path, family: str) -> None:
    """Rows packed, padded and alone give the same loss and gradient."""
    padded = tiny.gradients(made(tmp_path / "padded", family))
    alone = made(
        tmp_path / "alone",
        family,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=8,
        token_budget=1,
    )
    assert_same(tiny.gradients(alone), padded, 1e-4)
    model, tokenizer = build(family)
    if tiny.trainer(tmp_path / "auto", model=model, processing_class=tokenizer).backbone.check(0):
        assert_same(tiny.gradients(made(tmp_path / "packed", family, packing="packed")), padded, 1e-4)


def logits_of(model: Any) -> torch.Tensor:
    ids = torch.arange(16, 116)[None]
    with torch.no_grad():
        return model.eval()(input_ids=ids, use_cache=False).logits  # type: ignore[no-any-return]


@every
@kinds
def test_saved(tmp_path: Path, family: str, lora: bool) -> None:
    """What is saved opens in plain transformers, and peft, with the logits of the trained model."""
    built = made(tmp_path, family, lora)
    built.train()
    built.save_model(str(tmp_path / "saved"))
    if lora:
        opened = PeftModel.from_pretrained(build(family)[0], str(tmp_path / "saved"))
    else:
        kind = getattr(transformers, FAMILIES[family].model_class)
        opened, told = kind.from_pretrained(tmp_path / "saved", output_loading_info=True)
        assert not told["missing_keys"] and not told["unexpected_keys"], told
    torch.testing.assert_close(logits_of(opened), logits_of(built.model), atol=1e-5, rtol=1e-4)


@every
@kinds
def test_resumed(tmp_path: Path, family: str, lora: bool) -> None:
    """A run that goes on from a checkpoint ends with the bits of one that was left alone."""
    options = {"max_steps": 3, "save_strategy": "steps", "save_steps": 2, "optim": "adamw_torch"}
    whole = made(tmp_path / "whole", family, lora, **options)
    whole.train()
    resumed = made(tmp_path / "whole", family, lora, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert resumed.state.global_step == 3
    a, b = (dict(built.model.named_parameters()) for built in (whole, resumed))
    assert a.keys() == b.keys()
    assert [key for key in a if not a[key].equal(b[key])] == []
    assert all(value.equal(resumed.teacher.state[key]) for key, value in whole.teacher.state.items())


@every
def test_best(tmp_path: Path, family: str) -> None:
    """The best checkpoint is what the model is at the end: the first one, at a rate that harms."""
    built = made(
        tmp_path, family, max_steps=2, learning_rate=5.0, save_strategy="steps", save_steps=1,
        eval_strategy="steps",
        eval_steps=1, eval_dataset=tiny.rows(4), load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=False,
    )  # fmt: skip
    built.evaluate = lambda *args, **kwargs: {"eval_loss": float(built.state.global_step)}
    built.train()
    assert built.state.best_model_checkpoint.endswith("checkpoint-1")
    best = Path(built.state.best_model_checkpoint)
    kind = getattr(transformers, FAMILIES[family].model_class)
    last = logits_of(kind.from_pretrained(tmp_path / "checkpoint-2"))
    assert (last - logits_of(built.model)).abs().max() > 1e-3
    torch.testing.assert_close(logits_of(kind.from_pretrained(best)), logits_of(built.model))


@pytest.fixture
def folder(tmp_path: Path, family: str) -> Path:
    """The family's model and tokenizer, saved."""
    model, tokenizer = build(family)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def command(folder: Path, out: Path, lora: bool) -> list[str]:
    rows = out.parent / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in tiny.rows(8)))
    short = {
        "train_file": rows, "model_name_or_path": folder, "max_steps": 2, "max_completion_length": 6,
        "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1, "learning_rate": 1e-2,
        "output_dir": out, "retention_rows": 2,
    }  # fmt: skip
    words = [word for name, value in short.items() for word in (f"--{name}", str(value))]
    return ["train", *words, *(["--use_peft", "--lora_r", "4"] if lora else [])]


@every
@kinds
def test_command(tmp_path: Path, folder: Path, family: str, lora: bool) -> None:
    """`unisd train` writes a whole run; of an adapter, `unisd merge` makes the same model."""
    out = tmp_path / "out"
    assert main(command(folder, out, lora)) == 0
    assert json.loads((out / "results.json").read_text())["steps"] == 2
    if lora:
        assert main(["merge", str(out), "--output_dir", str(tmp_path / "merged")]) == 0
        kind = getattr(transformers, FAMILIES[family].model_class)
        merged = kind.from_pretrained(tmp_path / "merged")
        adapted = PeftModel.from_pretrained(kind.from_pretrained(folder), str(out))
        torch.testing.assert_close(logits_of(merged), logits_of(adapted), atol=1e-4, rtol=1e-4)


@every
def test_probe(tmp_path: Path, folder: Path, family: str) -> None:
    """`unisd probe` measures what the reference is worth to the model."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in tiny.rows(8)))
    words = ["probe", "--train_file", str(rows), "--model_name_or_path", str(folder), "--max_train_rows", "4"]
    assert main([*words, "--eval_max_new_tokens", "6"]) == 0


@pytest.mark.families
@pytest.mark.parametrize("family", SUBPROCESS)
def test_process(tmp_path: Path, folder: Path, family: str) -> None:
    """As a user starts it: a process of its own that says what it wrote."""
    words = command(folder, tmp_path / "out", lora=False)
    done = subprocess.run(
        [sys.executable, "-m", "unisd", *words], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "written to" in done.stdout and "results.json" in done.stdout
    assert transformers.AutoConfig.from_pretrained(tmp_path / "out").model_type
    assert load_file(tmp_path / "out" / "model.safetensors")
