"""Rollouts from a server that fails: each fault ends in recovery or in one clear error, and nothing
is lost.

The real vLLM, with a few of these faults, is in `test_vllm.py`; here a stand-in speaks its
protocol, so that all kinds can be had.
"""

from __future__ import annotations

import gc
import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model

from tests.helpers.serving import StandIn, serving
from tests.helpers.steps import STAR
from unisd import UniSDConfig, UserError
from unisd import http_client as patient_http
from unisd import testing as tiny
from unisd.errors import RolloutError
from unisd.rollout.engine import Sampling
from unisd.rollout.vllm import common
from unisd.rollout.vllm.server import ServerEngine
from unisd.testing import trainer
from unisd.training import checkpoints

PROMPTS = [[1, 10, 11], [1, 12], [1, 13, 14, 15]]
SAMPLING = Sampling(max_new_tokens=6, temperature=0.7)
KEYS = [(3, 0, i, 0) for i in range(3)]
FAULTS = (
    "500",
    "late",
    "hang up",
    "half",
    "no json",
    "too few log-probabilities",
    "two answers",
    "other vocabulary",
    "cut off",
    "other prompt",
    "nothing",
    "positive log-probability",
)


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patient_http, "FIRST_PAUSE", 0.01)


@pytest.fixture
def server() -> Iterator[StandIn]:
    with serving() as running:
        yield running


def engine(
    server: StandIn, folder: Path, model: Any = None, timeout: float = 0.5, **options: Any
) -> ServerEngine:
    asked = {
        "use_vllm": True,
        "vllm_mode": "server",
        "vllm_server_base_url": server.url,
        "vllm_server_timeout": timeout,
    }
    args = UniSDConfig(output_dir=str(folder), use_cpu=True, max_completion_length=6, **{**asked, **options})
    accelerator = Accelerator(cpu=True)
    return ServerEngine(args, model or tiny.model(), accelerator, [2], lambda: 4, folder / "sync")


def lora() -> Any:
    return get_peft_model(tiny.model(), LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))


# -- one request -----------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_that_passes_changes_nothing(server: StandIn, tmp_path: Path, fault: str) -> None:
    built = engine(server, tmp_path)
    built.sync()
    healthy = built.generate(PROMPTS, KEYS, SAMPLING)
    before = len(server.requests)
    server.faults = [fault, fault]
    assert built.generate(PROMPTS, KEYS, SAMPLING) == healthy
    assert not server.faults and len(server.requests) >= before + 4  # it did go wrong
    assert all(c.version == 4 and c.logps is not None and len(c.logps) == len(c.ids) for c in healthy)


@pytest.mark.parametrize("fault", ["500", "hang up", "two answers"])
def test_a_fault_that_stays_ends_in_one_clear_error(server: StandIn, tmp_path: Path, fault: str) -> None:
    built = engine(server, tmp_path)
    built.sync()
    server.broken = fault
    with pytest.raises(RolloutError) as raised:
        built.generate(PROMPTS, KEYS, SAMPLING)
    text = str(raised.value)
    assert (
        server.url in text
        and "vllm serve" in text
        and "train(resume_from_checkpoint=True)" in text
        and "\n" not in text
    )
    assert len(server.requests) >= 3 + len(PROMPTS)  # no fewer than three attempts a prompt


def test_an_address_with_v1_and_a_server_with_a_key(
    server: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.key = "secret"
    asked = {"vllm_server_base_url": server.url + "/v1/"}
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(UserError, match=r"HTTP 401: Unauthorized.*: set OPENAI_API_KEY"):
        engine(server, tmp_path, **asked)
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    built = engine(server, tmp_path, **asked)
    built.sync()
    assert len(built.generate(PROMPTS, KEYS, SAMPLING)) == len(PROMPTS)


def test_options_of_a_colocated_engine_are_named(
    server: StandIn, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    engine(server, tmp_path, vllm_max_model_length=64, vllm_gpu_memory_utilization=0.5)
    told = "vllm_gpu_memory_utilization, vllm_max_model_length: a server has its own, from its start."
    assert told in caplog.text
    caplog.clear()
    engine(server, tmp_path)
    assert not caplog.text


def test_an_address_of_no_host_ends_the_run_at_once(
    server: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unknown(*args: Any, **options: Any) -> Any:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    with pytest.raises(
        RolloutError,
        match=r"cannot be reached .there is no host of that name.*:"
        " correct its",
    ):
        engine(server, tmp_path, timeout=60.0, vllm_server_base_url="http://nowhere.invalid:1")


def test_tokens_that_nothing_defines_are_asked_to_be_left_out(server: StandIn, tmp_path: Path) -> None:
    model = tiny.model()
    head = model.get_output_embeddings()
    head.defined_tokens = head.out_features - 3
    built = engine(server, tmp_path, model)
    built.generate(PROMPTS[:1], KEYS[:1], SAMPLING)
    rows = range(head.out_features - 3, head.out_features)
    assert server.requests[-1]["logit_bias"] == {str(row): -100.0 for row in rows}


def test_no_server_at_all(tmp_path: Path) -> None:
    with serving() as gone:
        pass
    with pytest.raises(RolloutError, match="does not answer"):
        engine(gone, tmp_path, timeout=0.1)


def test_a_request_that_is_refused_is_not_sent_again(server: StandIn, tmp_path: Path) -> None:
    built = engine(server, tmp_path)
    built.sync()
    server.lacking = {"/v1/completions"}
    server.calls.clear()
    with pytest.raises(RolloutError, match="Not Found"):
        built.generate(PROMPTS[:1], KEYS[:1], SAMPLING)
    assert server.calls["/v1/completions"] == 2  # once, and once more after it was asked for its models


@pytest.mark.parametrize(
    ("lacking", "with_adapter"), [("/weight_info", False), ("/v1/load_lora_adapter", True)]
)
def test_a_server_started_with_too_little_says_with_what(
    server: StandIn, tmp_path: Path, lacking: str, with_adapter: bool
) -> None:
    server.lacking = {lacking}
    needed = "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1" if with_adapter else "VLLM_SERVER_DEV_MODE=1"
    with pytest.raises(UserError, match=needed):
        engine(server, tmp_path, lora() if with_adapter else None).sync()


def test_log_probabilities_without_the_temperature_are_refused(server: StandIn, tmp_path: Path) -> None:
    server.raw_logprobs = True
    with pytest.raises(UserError, match="--logprobs-mode processed_logprobs"):
        engine(server, tmp_path)
    engine(server, tmp_path, temperature=1.0)  # where both are the same


def test_truncated_sampling_tells_no_log_probabilities(server: StandIn, tmp_path: Path) -> None:
    """The engine's are of the truncated distribution, the trainer's are not."""
    for options in ({"top_p": 0.9}, {"top_k": 5}, {"min_p": 0.1}):
        built = engine(server, tmp_path, **options)
        assert not built.returns_logps
        assert [c.logps for c in built.generate(PROMPTS[:1], KEYS[:1], SAMPLING)] == [None]


def test_requests_ask_for_what_the_noise_key_says(server: StandIn, tmp_path: Path) -> None:
    built = engine(server, tmp_path)
    server.requests.clear()
    built.generate(PROMPTS, KEYS, SAMPLING)
    seeds = {tuple(r["prompt"]): r["seed"] for r in server.requests}
    assert seeds == {tuple(p): common.seed_of(k) for p, k in zip(PROMPTS, KEYS, strict=True)}
    other = [
        common.seed_of(key) for key in [(3, 0, 0, 0), (4, 0, 0, 0), (3, 1, 0, 0), (3, 0, 1, 0), (3, 0, 0, 1)]
    ]
    assert len(set(other)) == 5 and all(0 <= seed < 2**63 for seed in other)
    assert all(
        r["temperature"] == 0.7 and r["max_tokens"] == 6 and r["stop_token_ids"] == [2]
        for r in server.requests
    )
    assert all(r["repetition_penalty"] == 1 for r in server.requests)  # not the model's own default
    server.requests.clear()
    built.generate(PROMPTS[:1], None, SAMPLING)
    assert server.requests[0]["temperature"] == 0 and "seed" not in server.requests[0]


# -- weights ---------------------------------------------------------------------------------------


def test_all_weights_arrive_and_a_restarted_server_gets_them_again(server: StandIn, tmp_path: Path) -> None:
    model = tiny.model("qwen3")  # with a tied head
    built = engine(server, tmp_path, model)
    built.sync()
    expected = {name: p.detach() for name, p in model.named_parameters()}
    assert server.weights.keys() == expected.keys()
    assert all(server.weights[name].equal(expected[name]) for name in expected)
    healthy = built.generate(PROMPTS, KEYS, SAMPLING)
    server.restart()
    assert built.generate(PROMPTS, KEYS, SAMPLING) == healthy
    assert server.weights.keys() == expected.keys() and server.calls["/finish_weight_update"] == 2


def test_an_update_that_fails_is_started_again(server: StandIn, tmp_path: Path) -> None:
    """Before, the server said but that none was started: neither was it tried again, nor was the
    cause told.
    """
    built = engine(server, tmp_path, timeout=0.1)
    server.updating = True  # by a run that was killed between start and finish
    server.unreadable = 2
    built.sync()
    assert server.weights and server.version == built._tag and not server.updating
    server.unreadable = 1000
    with pytest.raises(RolloutError, match="No such file or directory"):
        built.sync()


def test_an_adapter_goes_alone_under_a_new_name_and_again_to_a_restarted_server(
    server: StandIn, tmp_path: Path
) -> None:
    model = lora()
    built = engine(server, tmp_path, model)
    names = set()
    for _ in range(4):
        built.sync()
        names.update(server.adapters)
    assert len(names) == 4 and len(server.adapters) == 2  # older ones are taken back
    assert len(list(tmp_path.glob("sync/*/*"))) == 2
    files = {path.name for path in Path(server.adapters[built._tag]).iterdir()}
    assert "adapter_model.safetensors" in files and "model.safetensors" not in files
    healthy = built.generate(PROMPTS, KEYS, SAMPLING)
    assert {r["model"] for r in server.requests[-3:]} == {built._tag}
    server.restart()
    assert built.generate(PROMPTS, KEYS, SAMPLING) == healthy and list(server.adapters) == [built._tag]
    assert server.calls["/update_weights"] == 0


@pytest.mark.parametrize("with_adapter", [pytest.param(False, marks=pytest.mark.long), True])
@pytest.mark.long
def test_no_weights_are_left_over(server: StandIn, tmp_path: Path, with_adapter: bool) -> None:
    """Neither an earlier run's, which was killed, nor this one's."""
    folder = tmp_path / "sync"
    (folder / "0123abcd" / "0123abcd-4-2").mkdir(parents=True)
    built = engine(server, tmp_path, lora() if with_adapter else None)
    assert not folder.exists()
    built.sync()
    assert {path.name for path in folder.glob("*/*")} == ({built._tag} if with_adapter else set())
    later = engine(server, tmp_path)  # as in a notebook: the first one is collected when the second has begun
    later._folder.mkdir(parents=True)
    del built
    gc.collect()
    assert list(folder.iterdir()) == [later._folder]
    del later
    gc.collect()
    assert not folder.exists()


def test_one_process_alone_tries_what_the_server_can(
    server: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others write to its folder no more than they open its weights."""
    (tmp_path / "sync").mkdir()
    monkeypatch.setattr(Accelerator, "is_main_process", False)
    built = engine(server, tmp_path)
    built.sync()
    assert set(server.calls) == {"/v1/models"} and (tmp_path / "sync").exists()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"r": 1024}, "lora_r=1024"),
        ({"r": 8, "rank_pattern": {"q_proj": 4}}, "leave rank_pattern and alpha_pattern"),
        ({"r": 8, "alpha_pattern": {"q_proj": 64}}, "leave rank_pattern and alpha_pattern"),
        ({"r": 8, "init_lora_weights": "pissa"}, "init_lora_weights=pissa changes"),
    ],
)
def test_adapters_that_vllm_cannot_serve(
    server: StandIn, tmp_path: Path, options: dict[str, Any], reason: str
) -> None:
    model = get_peft_model(
        tiny.model(), LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM", **options)
    )
    with pytest.raises(UserError, match=reason):
        engine(server, tmp_path, model)


# -- a run -----------------------------------------------------------------------------------------


def run(folder: Path, server: StandIn, **options: Any) -> Any:
    asked = {
        "use_vllm": True,
        "vllm_mode": "server",
        "vllm_server_base_url": server.url,
        "vllm_server_timeout": 0.3,
    }
    batches = {"gradient_accumulation_steps": 2, "num_train_epochs": 99, "max_steps": 4}
    return trainer(folder, train_dataset=tiny.rows(8), **{**batches, **asked, **options})


def lines(folder: Path, file: str = "metrics.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / file).read_text().splitlines()]


@pytest.mark.long
def test_weights_follow_the_student_and_their_version_is_recorded(server: StandIn, tmp_path: Path) -> None:
    built = run(tmp_path, server, temperature=0.7, num_iterations=2, save_strategy="no")
    seen = []
    before = built.state.global_step
    assert before == 0
    send = built.engine._send_weights

    def sent() -> None:
        send()
        name, parameter = next(iter(built.model.named_parameters()))
        seen.append((server.version.split("-")[1], server.weights[name].equal(parameter.detach())))

    built.engine._send_weights = sent
    built.train()
    assert seen == [("0", True), ("2", True)]
    found = lines(tmp_path)
    assert [line["rollout/weights_version"] for line in found] == [0, 0, 2, 2]
    assert all(line["importance/mean"] > 0 for line in found)
    synced = [line.get("step_time/sync", 0.0) for line in found]
    # reused answers need no weights sent
    assert synced[0] > 0 and synced[2] > 0 and synced[1] == synced[3] == 0
    # The sync is a part of the rollout's time, not one more.
    for line in found:
        parts = [
            value
            for name, value in line.items()
            if name.startswith("step_time/") and name != "step_time/sync"
        ]
        assert line["step_time"] == pytest.approx(sum(parts))
    assert {(r["step"], r["weights_version"]) for r in lines(tmp_path, "samples.jsonl")} == {
        (1, 0),
        (2, 0),
        (3, 2),
        (4, 2),
    }


@pytest.mark.parametrize("num_iterations", [1, 2])
@pytest.mark.long
def test_a_server_gone_in_mid_run_loses_no_step(tmp_path: Path, num_iterations: int) -> None:
    options = {**STAR, "temperature": 0.7, "num_iterations": num_iterations}
    with serving() as healthy:
        whole = run(tmp_path / "whole", healthy, save_strategy="no", **options)
        whole.train()

    folder = tmp_path / "broken"
    with serving() as failing:
        broken = run(folder, failing, save_strategy="no", **options)
        sync = broken.engine.sync

        def until_step_two() -> None:
            sync()
            if broken.state.global_step == 2:
                failing.broken = "hang up"

        broken.engine.sync = until_step_two
        with pytest.raises(UserError) as raised:
            broken.train()
        port = failing.server_address[1]
    text = str(raised.value)
    assert "does not answer" in text and "Step 2 is saved in checkpoint-2" in text and "\n" not in text
    assert checkpoints.problem_of(folder / "checkpoint-2") is None

    with serving(port) as again:
        resumed = run(folder, again, save_strategy="no", **options)
        resumed.train(resume_from_checkpoint=True)
    assert [line["step"] for line in lines(folder)] == [1, 2, 3, 4]
    expected = whole.model.state_dict()
    assert all(value.equal(expected[name]) for name, value in resumed.model.state_dict().items())
    assert all(value.equal(whole.teacher.state[name]) for name, value in resumed.teacher.state.items())


@pytest.mark.parametrize(
    ("now", "remedy"),
    [
        ({"lacking": {"/weight_info"}}, "VLLM_SERVER_DEV_MODE=1"),
        pytest.param({"lacking": {"/start_weight_update"}}, "VLLM_SERVER_DEV_MODE=1", marks=pytest.mark.long),
        pytest.param({"lacking": {"/v1/models", "/v1/completions"}}, "vllm serve", marks=pytest.mark.long),
        ({"key": "new"}, "set OPENAI_API_KEY"),
    ],
)
def test_a_server_that_refuses_in_mid_run_loses_no_step(
    server: StandIn, tmp_path: Path, now: dict[str, Any], remedy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that was started anew with less than before, say."""
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    built = run(tmp_path, server, save_strategy="no")
    sync = built.engine.sync

    def after_two_steps() -> None:
        if built.state.global_step == 2:
            server.restart()
            vars(server).update(now)
        sync()

    built.engine.sync = after_two_steps
    with pytest.raises(UserError, match="Step 2 is saved in checkpoint-2") as raised:
        built.train()
    assert remedy in str(raised.value) and "\n" not in str(raised.value)
    assert checkpoints.problem_of(tmp_path / "checkpoint-2") is None


def test_the_initial_models_answers_come_from_its_weights(server: StandIn, tmp_path: Path) -> None:
    built = run(
        tmp_path,
        server,
        completion_source="initial",
        distillation_mode="nll",
        save_strategy="no",
        max_steps=2,
    )
    name, initial = next((name, p.detach().clone()) for name, p in built.model.named_parameters())
    built.train()
    assert not built.model.state_dict()[name].equal(initial)
    assert server.weights[name].equal(initial) and lines(tmp_path)[-1]["rollout/weights_version"] == 0


# -- options ---------------------------------------------------------------------------------------


def test_vllm_that_is_not_installed_is_one_line_with_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("unisd.config.importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r'pip install "unisd\[vllm\]"') as raised:
        UniSDConfig(output_dir=str(tmp_path), use_cpu=True, use_vllm=True)
    assert "\n" not in str(raised.value)
    # the server has its own
    UniSDConfig(output_dir=str(tmp_path), use_cpu=True, use_vllm=True, vllm_mode="server")


@pytest.mark.parametrize(
    "options",
    [
        {"vllm_mode": "nowhere"},
        {"vllm_server_port": 0},
        {"vllm_gpu_memory_utilization": 2},
        {"completion_source": "reference"},
    ],
)
def test_options_are_checked(tmp_path: Path, options: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=next(iter(options))):
        UniSDConfig(
            output_dir=str(tmp_path), use_cpu=True, use_vllm=True, **{"vllm_mode": "server", **options}
        )


def test_address_of_the_server(tmp_path: Path) -> None:
    asked = {"output_dir": str(tmp_path), "use_cpu": True}
    assert (
        UniSDConfig(**asked, vllm_server_host="gpu1", vllm_server_port=9000).vllm_server_url
        == "http://gpu1:9000"
    )
    assert UniSDConfig(**asked, vllm_server_base_url="https://a/b/").vllm_server_url == "https://a/b"


def test_an_address_without_http_is_none() -> None:
    with pytest.raises(UserError, match="http://HOST:PORT"):
        patient_http.Client("localhost:8000", 1.0)


@pytest.mark.parametrize("url", ["http://user:secret@host:8000", "user:secret@host"])
def test_an_address_holds_no_password(url: str) -> None:
    """It would be logged with every retry."""
    with pytest.raises(UserError, match="OPENAI_API_KEY") as raised:
        patient_http.Client(url, 1.0)
    assert "secret" not in str(raised.value)


def test_the_plugin_imports_little() -> None:
    """A server's processes load it where perhaps nothing but vLLM is installed."""
    import subprocess
    import sys

    code = (
        "import sys, unisd.rollout.vllm.plugin; print([m for m in ('torch', 'transformers', 'peft') if m in"
        " sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_half_an_answer_is_no_completion() -> None:
    asked = {"limit": 4, "eos_ids": [2], "vocabulary": 50, "version": 0}
    assert common.completion_of([5, 2], [-0.5, -0.1], **asked).truncated is False
    assert common.completion_of([5, 6, 7, 8], [-0.5] * 4, **asked).truncated is True
    for ids, logps in (
        ([], []),
        ([5], [-1.0]),
        ([5, 2], [-1.0]),
        ([5, 2], [-1.0, None]),
        ([2, True], [-1.0] * 2),
        ([5] * 5, [-1] * 5),
    ):
        with pytest.raises(patient_http.BadAnswer):
            common.completion_of(ids, logps, **asked)
    assert torch.tensor(common.completion_of([2], [1e-5], **asked).logps).max() <= 0
