"""What `unisd merge --gguf` writes computes what the model does, with its tokenizer and turns."""

from __future__ import annotations

import json
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from unisd import testing as tiny
from unisd.cli import main
from unisd.run.gguf_export import PRE_TOKENIZERS, _pre_tokenizer
from unisd.run.ollama import marks_of, modelfile

IDS = torch.tensor([[1, 7, 45, 99, 200, 7, 8, 31]])
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


def tokenizer_with_merges() -> PreTrainedTokenizerFast:
    """Every real tokenizer has merges; transformers reads no file without."""
    tokenizer = tiny.tokenizer()
    core = json.loads(tokenizer.backend_tokenizer.to_str())
    core["model"]["vocab"] |= {"ie": 262, "Ġv": 263}
    core["model"]["merges"] = [["i", "e"], ["Ġ", "v"]]
    names = {name: getattr(tokenizer, name) for name in ("pad_token", "bos_token", "eos_token")}
    rest = {"additional_special_tokens": tiny.SPECIAL[3:], "chat_template": tokenizer.chat_template}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(core)), **names, **rest)


def built(family: str) -> Any:
    torch.manual_seed(0)
    # one row more than tokens, as models have whose rows are filled up
    sizes = tiny.SIZES | {"vocab_size": 265, "hidden_size": 64, "intermediate_size": 96}
    if family == "qwen2":
        model: Any = Qwen2ForCausalLM(Qwen2Config(**sizes, tie_word_embeddings=True))
    elif family == "qwen3":
        model = Qwen3ForCausalLM(Qwen3Config(**sizes, head_dim=32))
    else:
        rope = {"rope_parameters": LLAMA3} if family == "llama3" else {}
        model = LlamaForCausalLM(LlamaConfig(**sizes, **rope))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return model.eval()


@pytest.fixture
def adapter(tmp_path: Path) -> Callable[[str], Path]:
    def build(family: str) -> Path:
        built(family).save_pretrained(tmp_path / "base")
        tokenizer_with_merges().save_pretrained(tmp_path / "base")
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        changed = ["q_proj", "k_proj", "down_proj"]
        get_peft_model(
            base, LoraConfig(r=4, target_modules=changed, init_lora_weights=False)
        ).save_pretrained(tmp_path / "out")
        return tmp_path / "out"

    return build


@pytest.mark.long
@pytest.mark.parametrize(
    ("family", "kind"), [("llama", "f16"), ("llama3", "q8_0"), ("qwen2", "q8_0"), ("qwen3", "f16")]
)
def test_the_file_computes_what_the_model_does(
    family: str,
    kind: str,
    adapter: Callable[[str], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["merge", str(adapter(family)), "--gguf", kind]) == 0
    merged = tmp_path / "out-merged"
    said = capsys.readouterr().out
    assert f"written to {merged / f'model-{kind}.gguf'}: {kind}, and a Modelfile" in said
    assert {path.name for path in tmp_path.iterdir()} == {"base", "out", "out-merged"}
    assert all(path.stat().st_mode & stat.S_IROTH for path in merged.iterdir())

    gguf = {"gguf_file": f"model-{kind}.gguf"}
    model = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)
    place = tmp_path / "alone"  # with nothing beside the file that transformers could read instead
    place.mkdir()
    (merged / gguf["gguf_file"]).rename(place / gguf["gguf_file"])
    # transformers does not read these two of a GGUF file
    config = model.config.__class__.from_pretrained(place, **gguf)
    config.head_dim = 32 if family == "qwen3" else 16
    config.rope_parameters = model.config.rope_parameters
    read = AutoModelForCausalLM.from_pretrained(place, config=config, dtype=torch.float32, **gguf)
    with torch.no_grad():
        expected, found = model(IDS).logits, read(IDS).logits
    close = 0.005 if kind == "f16" else 0.05
    assert 0 < (found - expected).abs().max() < close * expected.abs().max()
    sampled = {"max_new_tokens": 4, "do_sample": False}
    if kind == "f16":
        assert torch.equal(read.generate(IDS, **sampled), model.generate(IDS, **sampled))
    tokenizer, back = tokenizer_with_merges(), AutoTokenizer.from_pretrained(place, **gguf)
    text = "<|user|>Wie viel ist 12 + 30?\n<|assistant|>"
    assert back(text, add_special_tokens=False)["input_ids"] == tokenizer(text)["input_ids"]
    assert back.chat_template == tokenizer.chat_template
    assert (back.eos_token_id, back.bos_token_id) == (2, 1)


@pytest.mark.long
def test_what_llama_cpp_reads(adapter: Callable[[str], Path], tmp_path: Path) -> None:
    from gguf import GGUFReader

    assert main(["merge", str(adapter("llama3")), "--gguf", "q4_k_m"]) == 0
    reader = GGUFReader(tmp_path / "out-merged" / "model-f16.gguf")
    told = {name: field.contents() for name, field in reader.fields.items()}
    assert told["general.architecture"] == "llama" and told["llama.rope.dimension_count"] == 16
    assert told["tokenizer.ggml.model"] == "gpt2" and told["tokenizer.ggml.pre"] == "gpt-2"
    assert told["tokenizer.ggml.token_type"][:7] == [3, 3, 3, 3, 3, 3, 1]
    assert told["tokenizer.ggml.tokens"][262:] == ["ie", "Ġv", "[PAD264]"]
    assert told["tokenizer.ggml.token_type"][262:] == [1, 1, 5]
    assert told["tokenizer.ggml.eos_token_id"] == 2 and told["tokenizer.ggml.add_bos_token"] is False
    factors = next(tensor.data for tensor in reader.tensors if tensor.name == "rope_freqs.weight")
    assert factors[0] == pytest.approx(1) and factors[-1] == pytest.approx(8)


LLAMA_CPP = """
import json, sys
import xllamacpp
asked = xllamacpp.CommonParams()
asked.model.path = sys.argv[1]
asked.n_ctx, asked.n_parallel, asked.cpuparams.n_threads, asked.warmup = 256, 1, 1, False
request = json.loads(sys.argv[2]) | {"max_tokens": 6, "temperature": 0, "logprobs": 1}
found = xllamacpp.Server(asked).handle_completions(request)
print(json.dumps(found["choices"][0]["logprobs"]["content"]))
"""


@pytest.mark.real
@pytest.mark.parametrize("family", ["llama", "llama3", "qwen2", "qwen3"])
def test_llama_cpp_computes_the_same(family: str, tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp", reason="llama.cpp itself: pip install --no-deps xllamacpp")
    model = built(family)
    model.save_pretrained(tmp_path / "model")
    tokenizer_with_merges().save_pretrained(tmp_path / "model")
    assert main(["merge", str(tmp_path / "model"), "--gguf", "f16"]) == 0
    file = tmp_path / "model-gguf" / "model-f16.gguf"
    # Single bytes beyond ASCII are no text: llama.cpp would report several of them as one.
    letters = [
        i
        for i, token in enumerate(tokenizer_with_merges().convert_ids_to_tokens(range(6, 262)), 6)
        if token.isascii()
    ]
    request = {"prompt": IDS[0].tolist(), "logit_bias": {i: -100 for i in range(265) if i not in letters}}
    words = [sys.executable, "-c", LLAMA_CPP, str(file), json.dumps(request)]
    done = subprocess.run(words, capture_output=True, text=True)  # its threads are not torch's
    assert done.returncode == 0, done.stderr[-2000:]
    told = json.loads(done.stdout.splitlines()[-1])
    ids = torch.tensor([[*IDS[0].tolist(), *(token["id"] for token in told)]])
    with torch.no_grad():
        logps = model(ids).logits[0, IDS.shape[1] - 1 : -1].log_softmax(-1)
    chosen = torch.tensor(letters)[logps[:, letters].argmax(-1)]
    assert torch.equal(chosen, ids[0, IDS.shape[1] :]) and len(told) == 6
    expected = logps.gather(-1, chosen[:, None])[:, 0]
    assert [token["logprob"] for token in told] == pytest.approx(expected.tolist(), abs=0.02)


@pytest.mark.long
def test_a_full_model_and_a_quantiser_that_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    built("qwen3").save_pretrained(tmp_path / "model")
    tokenizer_with_merges().save_pretrained(tmp_path / "model")
    assert main(["merge", str(tmp_path / "model"), "--gguf", "q4_k_m"]) == 0
    made = tmp_path / "model-gguf"
    assert {path.name for path in made.iterdir()} == {"model-f16.gguf", "Modelfile"}
    command = f"llama-quantize {made / 'model-f16.gguf'} {made / 'model-q4_k_m.gguf'} Q4_K_M"
    assert command in capsys.readouterr().out
    program = tmp_path / "bin" / "llama-quantize"
    program.parent.mkdir()
    program.write_text('#!/bin/sh\n[ "$3" = Q4_K_M ] && cp "$1" "$2"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:/usr/bin:/bin")
    assert (
        main(["merge", str(tmp_path / "model"), "--gguf", "q4_k_m", "--output_dir", str(tmp_path / "q")]) == 0
    )
    assert {path.name for path in (tmp_path / "q").iterdir()} == {"model-q4_k_m.gguf", "Modelfile"}
    program.write_text("#!/bin/sh\necho no such type >&2\nexit 1\n")
    assert (
        main(["merge", str(tmp_path / "model"), "--gguf", "q4_k_m", "--output_dir", str(tmp_path / "n")]) == 2
    )
    assert "llama-quantize failed (no such type). Nothing was written" in capsys.readouterr().err
    assert not (tmp_path / "n").exists()


@pytest.mark.parametrize(
    ("family", "change", "reason"),
    [
        ("gemma3", {}, "gemma3_text is none of llama, qwen2, qwen3"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}},
            "scaled by 'yarn'",
        ),
        ("llama", {"vocab_size": 100}, "its tokenizer knows 264 tokens, its embedding 100"),
    ],
)
def test_refusals_come_before_anything_is_loaded(
    family: str, change: dict[str, Any], reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny.FAMILIES[family]().config.to_dict() | change
    (tmp_path / "config.json").write_text(json.dumps(config))
    tokenizer_with_merges().save_pretrained(tmp_path)
    assert main(["merge", str(tmp_path), "--gguf", "f16"]) == 2
    error = capsys.readouterr().err
    assert error.splitlines()[-1].startswith("unisd: error: --gguf cannot write")
    assert reason in error and "convert_hf_to_gguf.py" in error


def pre_tokenized(steps: list[Any]) -> PreTrainedTokenizerFast:
    core = Tokenizer(models.BPE(vocab={"a": 0}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.Sequence(steps)
    return PreTrainedTokenizerFast(tokenizer_object=core)


def test_the_name_of_the_pre_tokenizer() -> None:
    whole = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    for name in ("qwen2", "llama-bpe"):
        pattern = str(PRE_TOKENIZERS[name][0][1])
        split = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
        assert _pre_tokenizer(pre_tokenized([split, whole])) == name
        other = pre_tokenizers.Split(Regex(pattern + "|x"), behavior="isolated")
        assert _pre_tokenizer(pre_tokenized([other, whole])) is None
    assert _pre_tokenizer(tiny.tokenizer()) == "gpt-2"
    assert _pre_tokenizer(AutoTokenizer.from_pretrained("src/unisd/pocket/base")) == "smollm"


CHATML = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nBe brief.<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_the_modelfile_has_the_turns_of_the_chat_template() -> None:
    tokenizer = tiny.tokenizer()
    marks = marks_of(tokenizer)
    assert marks is not None and marks.without("<s>").begin == ""
    text, has_template = modelfile(tokenizer, "model-f16.gguf", [2], bos=True)
    assert has_template and text.startswith('FROM ./model-f16.gguf\nTEMPLATE """')
    assert "<s>" not in text and 'PARAMETER stop "<|end|>"' in text
    other = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, chat_template=CHATML)
    assert (found := marks_of(other)) is not None
    assert found.go == (
        "{{ if .System }}<|im_start|>system\n{{ .System }}<|im_end|>\n{{ else }}<|im_start|>system\nBe brief."
        '<|im_end|>\n{{ end }}{{ range .Messages }}{{ if eq .Role "user" }}<|im_start|>user\n{{ .Content }}'
        '{{ else if eq .Role "assistant" }}<|im_end|>\n<|im_start|>assistant\n{{ .Content }}<|im_end|>\n'
        "{{ end }}{{ end }}<|im_end|>\n<|im_start|>assistant\n"
    )
    # more than marks around turns: it numbers them
    other.chat_template = "{% for m in messages %}{{ loop.index }} {{ m['content'] }} {% endfor %}"
    assert marks_of(other) is None
    assert modelfile(other, "f", [2], bos=False) == ('FROM ./f\nPARAMETER stop "<|end|>"\n', False)
