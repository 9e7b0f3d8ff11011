"""Rollouts by the real vLLM on SmolLM2-135M in float32: colocated and served, all weights and an
adapter, from one configuration file. Faults that a healthy server does not produce come from a
proxy in front of it.

Run by `.ci/run` in an environment that holds vLLM: `pytest -m vllm -s
tests/end_to_end/test_vllm.py` prints what was measured.
"""

from __future__ import annotations

import gc
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.serving import passing_on
from unisd.cli.main import main
from unisd.data.prompts import encode_prompt
from unisd.http_client import Request
from unisd.models import load as models
from unisd.rollout.engine import Sampling
from unisd.rollout.vllm.server import COMPLETIONS, ServerEngine
from unisd.training import setup

pytestmark = pytest.mark.vllm

TOLERANCE = 1e-3  # nats, of a token's log-probability
PATIENCE = 40.0  # seconds for one answer, where one comes too late
SAMPLING = Sampling(max_new_tokens=16, temperature=0.7)
RUN = """\
recipe: sdft
model_name_or_path: smollm2-135m
dtype: float32
train_file: {rows}
eval_file: {rows}
grader: contains
max_steps: 3
per_device_train_batch_size: 1
gradient_accumulation_steps: 2
max_completion_length: 12
max_eval_rows: 1
learning_rate: 1.0e-4
vllm_gpu_memory_utilization: 0.05
vllm_max_model_length: 512
save_strategy: "no"
seed: 5
"""


@pytest.fixture(scope="module")
def configuration(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One file for one process, two processes and every kind of vLLM."""
    folder = tmp_path_factory.mktemp("run")
    sums = [(a, b) for a in (3, 7, 12) for b in (5, 8, 21, 34)]
    rows = [
        {
            "prompt": f"What is {a} plus {b}?",
            "privileged_context": f"{a} plus {b} is {a + b}.",
            "completion": str(a + b),
        }
        for a, b in sums
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    file = folder / "run.yaml"
    file.write_text(RUN.format(rows=folder / "rows.jsonl"))
    return file


def lines(folder: Path, file: str = "metrics.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / file).read_text().splitlines()]


@pytest.fixture(scope="module")
def plain_keys(configuration: Path, tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """The metrics of the same run with transformers' `generate`."""
    folder = tmp_path_factory.mktemp("plain")
    assert (
        main(["train", "--config", str(configuration), "--use_peft", "--output_dir", str(folder / "out")])
        == 0
    )
    return set(lines(folder / "out")[-1])


def largest_gap(engine: Any, model: Any) -> float:
    """Between the engine's log-probabilities of what it samples and those of a plain forward pass
    of the student, in nats.
    """
    tokenizer = models.load_tokenizer("smollm2-135m")
    prompts = [
        encode_prompt(tokenizer, text)
        for text in ("What is 2 plus 2?", "Name three fruits.", "Tell me about the sea.")
    ]
    completions = engine.generate(prompts, [(1, 0, i, 0) for i in range(len(prompts))], SAMPLING)
    assert len(completions) == len(prompts)
    gaps = []
    for prompt, completion in zip(prompts, completions, strict=True):
        with torch.no_grad():
            logits_TV = model(torch.tensor([prompt + completion.ids])).logits[0, len(prompt) - 1 : -1].float()
        logp_TV = (logits_TV / SAMPLING.temperature).log_softmax(-1)
        expected_T = logp_TV.gather(-1, torch.tensor(completion.ids)[:, None])[:, 0]
        gaps.append((torch.tensor(completion.logps) - expected_T).abs().max())
    return float(torch.stack(gaps).max())


def train_and_compare(
    configuration: Path, folder: Path, flags: list[str], request: pytest.FixtureRequest
) -> None:
    """Three steps with the command; the engine's log-probabilities before them, in them, and after
    further moves of the weights.
    """
    seen: dict[str, Any] = {}
    build = setup.vllm_engine

    def watched(args: Any, model: Any, *rest: Any) -> Any:
        start = time.monotonic()
        engine = build(args, model, *rest)
        seen.update(
            engine=engine,
            model=model,
            start=time.monotonic() - start,
            before=largest_gap(engine, model.eval()),
        )
        return engine

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(setup, "vllm_engine", watched)
        assert main(["train", "--config", str(configuration), *flags, "--output_dir", str(folder)]) == 0
    found = lines(folder)
    assert [line["rollout/weights_version"] for line in found] == [0, 1, 2]
    for line in found:  # our scorer against the engine, in every step
        assert abs(line["importance/gap"]) < TOLERANCE and abs(line["importance/mean"] - 1) < TOLERANCE
        assert line["importance/max"] < 1 + 10 * TOLERANCE and line["loss"] > 0
    assert lines(folder, "samples.jsonl")[-1]["weights_version"] == 2

    engine, model = seen["engine"], seen["model"].eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * parameter.abs().mean() * torch.randn(parameter.shape, generator=generator)
    unsynced = largest_gap(engine, model)
    start = time.monotonic()
    engine.sync()
    seconds = time.monotonic() - start
    synced = largest_gap(engine, model)
    print(
        f"\n{' '.join(flags)}: gap before {seen['before']:.1e}, weights moved {unsynced:.2f}, after a sync"
        f" {synced:.1e} nats; start {seen['start']:.0f} s, sync {seconds:.2f} s, rollout"
        f" {found[-1]['step_time/rollout']:.2f} s a step"
    )
    assert seen["before"] < TOLERANCE and synced < TOLERANCE
    assert unsynced > 20 * TOLERANCE  # so that a sync that does nothing would be seen
    if "server" in flags and "--use_peft" in flags:  # as if it had been started anew
        engine.client.ask(Request("/v1/unload_lora_adapter", {"lora_name": engine._tag}, sentence=True))
        assert largest_gap(engine, model) < TOLERANCE
    seen.clear()
    gc.collect()
    engine_keys = {key for key in found[-1] if key.startswith(("rollout/", "importance/"))} | {
        "step_time/sync"
    }
    assert set(found[-1]) - engine_keys == request.getfixturevalue("plain_keys")


@pytest.mark.parametrize("adapter", [[], ["--use_peft", "--lora_dropout", "0"]], ids=["full", "lora"])
def test_colocated(
    configuration: Path, tmp_path: Path, adapter: list[str], request: pytest.FixtureRequest
) -> None:
    train_and_compare(
        configuration, tmp_path / "out", ["--use_vllm", "--vllm_mode", "colocate", *adapter], request
    )


def test_colocated_in_two_processes_samples_the_same(tmp_path: Path) -> None:
    """The pocket model: an engine in each process, and each row's answer and the losses are those
    of one process.
    """
    asked = [
        "train",
        "--recipe",
        "sdft",
        "--max_steps",
        "2",
        "--max_completion_length",
        "12",
        "--max_eval_rows",
        "2",
    ]
    asked += [
        "--record_samples",
        "4",
        "--per_device_train_batch_size",
        "2",
        "--use_vllm",
        "--vllm_gpu_memory_utilization",
        "0.02",
    ]
    folders = tmp_path / "one", tmp_path / "two"
    assert main([*asked, "--gradient_accumulation_steps", "2", "--output_dir", str(folders[0])]) == 0
    asked += ["--gradient_accumulation_steps", "1", "--accelerate_config", "ddp", "--num_processes", "2"]
    assert main([*asked, "--output_dir", str(folders[1])]) == 0
    (one, its_answers), (two, their_answers) = (
        (lines(folder), {(r["step"], r["id"]): r["tokens"] for r in lines(folder, "samples.jsonl")})
        for folder in folders
    )
    assert [line["loss"] for line in two] == pytest.approx([line["loss"] for line in one], rel=1e-4)
    assert [line["completions/mean_length"] for line in two] == [
        line["completions/mean_length"] for line in one
    ]
    assert [line["rollout/weights_version"] for line in two] == [0, 1]
    shared = its_answers.keys() & their_answers.keys()  # only the first process records
    assert len(shared) >= 4 and all(its_answers[key] == their_answers[key] for key in shared)


class Server:
    """A server of the kind that the error messages tell the user to start."""

    def __init__(self, folder: Path, options: list[str]) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url, self.log = f"http://127.0.0.1:{port}", folder / "server.log"
        # `vllm serve` looks for a package called vllm, which the one for CPUs is not.
        served = [
            sys.executable,
            "-m",
            "vllm.entrypoints.openai.api_server",
            "--model",
            models.resolve("smollm2-135m"),
        ]
        self.command = [
            *served,
            "--host",
            "127.0.0.1",
            "--port",
            str(port),
            "--dtype",
            "float32",
            "--logprobs-mode",
        ]
        self.command += ["processed_logprobs", "--max-model-len", "512", "--enforce-eager", *options]

    def start(self) -> None:
        switches = {
            "VLLM_SERVER_DEV_MODE": "1",
            "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
            "VLLM_NO_USAGE_STATS": "1",
        }
        small = {
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "VLLM_LOGGING_LEVEL": "WARNING",
        }
        with self.log.open("wb") as output:
            self.child = subprocess.Popen(
                self.command, env={**os.environ, **switches, **small}, stdout=output, stderr=output
            )
        deadline = time.monotonic() + 600
        while True:
            assert self.child.poll() is None and time.monotonic() < deadline, self.log.read_text(
                errors="replace"
            )[-3000:]
            try:
                return urllib.request.urlopen(f"{self.url}/health", timeout=5).close()
            except OSError:
                time.sleep(0.5)

    def stop(self) -> None:
        self.child.terminate()
        try:
            self.child.wait(30)
        except subprocess.TimeoutExpired:
            self.child.kill()
            self.child.wait()


@pytest.mark.parametrize(
    ("adapter", "options"),
    [
        ([], ["--weight-transfer-config", '{"backend": "unisd"}']),
        (["--use_peft", "--lora_dropout", "0"], ["--enable-lora", "--max-lora-rank", "64"]),
    ],
    ids=["full", "lora"],
)
def test_server(
    configuration: Path,
    tmp_path: Path,
    adapter: list[str],
    options: list[str],
    request: pytest.FixtureRequest,
) -> None:
    server = Server(tmp_path, options)
    try:
        server.start()
        flags = ["--use_vllm", "--vllm_mode", "server", "--vllm_server_base_url", server.url, *adapter]
        train_and_compare(configuration, tmp_path / "out", flags, request)
        if adapter:
            served_as_trained(configuration, tmp_path / "out", server)
        else:
            two_processes(configuration, tmp_path / "two", flags)
            through_faults(configuration, tmp_path / "faults", server, lines(tmp_path / "out"))
    finally:
        server.stop()


def served_as_trained(configuration: Path, folder: Path, server: Server) -> None:
    """The commands of docs/howto/serving.md: the server answers as `unisd eval` on the folder does,
    first with the adapter beside its base, then with the merged model.
    """
    asked = ["eval", "--train_file", str(configuration.with_name("rows.jsonl")), "--split", "all"]
    asked += ["--grader", "contains", "--max_eval_rows", "4", "--eval_max_new_tokens", "12", "--rows"]

    def answers(*where: str) -> list[str]:
        file = folder.with_name("answers.jsonl")
        assert main([*asked, str(file), *where]) == 0
        return [record["completion"] for record in lines(folder.parent, file.name)]

    expected = answers("--model", str(folder), "--dtype", "float32", "--retention", "none")
    adapter = json.dumps({"lora_name": "mine", "lora_path": str(folder)}).encode()
    headers = {"Content-Type": "application/json"}
    load = urllib.request.Request(f"{server.url}/v1/load_lora_adapter", adapter, headers)
    urllib.request.urlopen(load, timeout=60).close()  # as --lora-modules does at the start
    assert answers("--server_url", server.url, "--server_model", "mine") == expected
    assert main(["merge", str(folder), "--output_dir", str(folder.with_name("merged"))]) == 0
    server.stop()
    server.command = [
        word for word in server.command if word not in ("--enable-lora", "--max-lora-rank", "64")
    ]
    server.command[server.command.index("--model") + 1] = str(folder.with_name("merged"))
    server.start()
    assert answers("--server_url", server.url) == expected


def two_processes(configuration: Path, folder: Path, flags: list[str]) -> None:
    """The same file again, two processes this time, each of which asks for its own rows."""
    asked = [
        "--accelerate_config",
        "ddp",
        "--num_processes",
        "2",
        "--gradient_accumulation_steps",
        "1",
        "--max_steps",
        "1",
    ]
    assert main(["train", "--config", str(configuration), *asked, *flags, "--output_dir", str(folder)]) == 0
    line = lines(folder)[-1]
    assert line["rollout/weights_version"] == 0 and abs(line["importance/gap"]) < TOLERANCE


def through_faults(configuration: Path, folder: Path, server: Server, healthy: list[dict[str, Any]]) -> None:
    """The same three steps: answers go wrong in the first two, a sync in the second, and in the
    third the server is started anew.
    """
    sync = ServerEngine.sync

    def eventful(engine: ServerEngine) -> None:
        step = engine._finished_steps()
        if step == 0:
            proxy.faults[COMPLETIONS] = ["late", "500", "half"]
        if step == 1:
            proxy.faults[COMPLETIONS] = ["a token too few", "lost"]
            proxy.faults |= {
                path: ["lost"]
                for path in ("/start_weight_update", "/update_weights", "/finish_weight_update")
            }
        sync(engine)
        if step == 2:
            server.stop()
            server.start()

    with passing_on(server.url, PATIENCE + 1) as proxy, pytest.MonkeyPatch.context() as patched:
        patched.setattr(ServerEngine, "sync", eventful)
        flags = [
            "--vllm_mode",
            "server",
            "--vllm_server_base_url",
            proxy.url,
            "--vllm_server_timeout",
            str(PATIENCE),
        ]
        assert (
            main(["train", "--config", str(configuration), "--use_vllm", *flags, "--output_dir", str(folder)])
            == 0
        )
    assert not any(proxy.faults.values())
    # What the client takes as "done already" is what this vLLM says.
    assert any("already active" in text for text in proxy.refusals)
    assert any("without a matching start" in text for text in proxy.refusals)
    found = lines(folder)
    assert [line["rollout/weights_version"] for line in found] == [0, 1, 2]
    assert all(abs(line["importance/gap"]) < TOLERANCE for line in found)
    assert [line["loss"] for line in found] == pytest.approx([line["loss"] for line in healthy], rel=1e-3)
    gc.collect()  # the trainer is a cycle; the engine goes with it
    assert not list(folder.glob("*vllm-sync*"))
