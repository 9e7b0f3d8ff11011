"""vLLM as a server of its own: requests over HTTP, weights through a folder that both reach.

A server serves one run at a time when all weights are trained; with adapters, whose names carry the
run, any number.
"""

from __future__ import annotations

import logging
import shutil
import uuid
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from unisd.config import UniSDConfig
from unisd.errors import RolloutError, by_caller
from unisd.http_client import BadAnswer, Client, Refused, Request, Unavailable
from unisd.rollout.engine import Completion, NoiseKey, Sampling
from unisd.rollout.vllm import common
from unisd.rollout.vllm.plugin import BACKEND

logger = logging.getLogger(__name__)

COMPLETIONS = "/v1/completions"
COLOCATED = ("vllm_gpu_memory_utilization", "vllm_max_model_length", "vllm_enable_sleep_mode")
ADAPTERS_KEPT = 2  # on disk; a server that was started anew is given the newest again


class Restarted(Exception):
    """The server does not hold this run's weights any more."""


class ServerEngine(common.VllmEngine):
    """Generates on a vLLM server with weights that it is given at each `sync`.

    See `build_engine` for the arguments.

    Args:
        folder: where weights are put for the server to read: on a disk that both see under the same
            path. What an earlier run has left in it is removed, and so is what this one puts there
            when it ends.

    Raises:
        RolloutError: no server answers, or it was started without what this run needs.
    """

    def __init__(
        self,
        args: UniSDConfig,
        model: Any,
        accelerator: Accelerator,
        eos_ids: Sequence[int],
        finished_steps: Callable[[], int],
        folder: Path,
    ) -> None:
        super().__init__(args, model, accelerator, eos_ids, finished_steps)
        self.client = Client(args.vllm_server_url, args.vllm_server_timeout, waits=True)
        self._requests_at_once = args.rollout_batch_size
        self._tag = ""  # what the server calls the weights of the newest sync; the same on all ranks
        self._syncs = 0
        run = [uuid.uuid4().hex[:8]]
        if accelerator.num_processes > 1:
            broadcast_object_list(run)
        self._run = run[0]
        self._folder = folder.absolute() / self._run
        if accelerator.is_main_process:
            if ignored := [name for name in COLOCATED if getattr(args, name) != getattr(UniSDConfig, name)]:
                logger.warning("%s: a server has its own, from its start.", ", ".join(ignored))
            shutil.rmtree(folder, ignore_errors=True)
            weakref.finalize(self, _remove, self._folder)
        self._start = self._start_command(args)
        self._base = self._connect(args)

    # -- the server --------------------------------------------------------------------------------

    def _start_command(self, args: UniSDConfig) -> str:
        """What starts a server that this run can use."""
        name = str(self.bare.config._name_or_path or "MODEL")
        options = f"--dtype {self._dtype} --logprobs-mode processed_logprobs"
        if self._with_adapter:
            rank = common.lora_rank(self.model)
            return (
                f"VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 vllm serve {name} {options} --enable-lora"
                f" --max-lora-rank {rank}"
            )
        return (
            f'VLLM_SERVER_DEV_MODE=1 vllm serve {name} {options} --weight-transfer-config \'{{"backend":'
            f' "{BACKEND}"}}\''
        )

    def _gone(self, trouble: Exception) -> RolloutError:
        resume = by_caller("--resume_from_checkpoint", "train(resume_from_checkpoint=True)")
        return RolloutError(
            f"the vLLM server at {self.client.url} does not answer ({trouble}); start it with: {self._start};"
            f" training continues from the last checkpoint with {resume}."
        )

    def _unfit(self, what: str) -> RolloutError:
        return RolloutError(f"the vLLM server at {self.client.url} {what}: start it with: {self._start}")

    def _ask(self, path: str, body: dict[str, Any] | None = None, **options: Any) -> Any:
        """Ask one `Request`; what goes wrong ends the run and loses no step.

        `refusal` says what a 4xx means.
        """
        refusal = options.pop("refusal", "refuses a request")
        try:
            return self.client.ask(Request(path, body, **options))
        except (Refused, Unavailable) as error:
            raise self._error(error, path, refusal) from error

    def _error(self, error: Exception, path: str, refusal: str) -> Exception:
        """What a run ends with, or `Restarted`."""
        if not isinstance(error, Refused):
            return self._gone(error)
        if error.status == 404 and path == COMPLETIONS:  # it does not know the model, say an adapter
            return Restarted(error.text)
        if error.wants_key:
            return RolloutError(
                f"the vLLM server at {self.client.url} {refusal} ({error}): set OPENAI_API_KEY."
            )
        if not error.status:
            return RolloutError(
                f"the vLLM server at {self.client.url} cannot be reached ({error}): correct its address."
            )
        return self._unfit(f"{refusal} ({error})")

    def _connect(self, args: UniSDConfig) -> str:
        """Wait for the server, look at what it can do, and return the name of its model."""
        served = self._ask("/v1/models", method="GET", read=_models)
        base = str(served[0]["id"])
        if not self._accelerator.is_main_process:
            return base
        longest, needed = served[0].get("max_model_len"), args.max_completion_length + 1
        if isinstance(longest, int) and longest < needed:
            raise self._unfit(
                f"takes at most {longest} tokens, fewer than"
                f" max_completion_length={args.max_completion_length}"
            )
        if args.temperature != 1:
            self._check_logprobs_mode(base)
        if not self._with_adapter:
            self._begin_transfer()
        return base

    def _begin_transfer(self) -> None:
        refusal = "cannot take over weights; it needs `unisd` installed beside it"
        self._ask("/weight_info", method="GET", refusal=refusal)
        self._ask("/init_weight_transfer_engine", {"init_info": {}}, retry=False, refusal=refusal)

    def _check_logprobs_mode(self, base: str) -> None:
        """Check that log-probabilities are those drawn with.

        A token's must change with the temperature.
        """
        likely = []
        for temperature in (1.0, 0.5):
            body = {
                "model": base,
                "prompt": [self.eos_ids[0]],
                "max_tokens": 1,
                "temperature": temperature,
                "logprobs": 1,
            }
            try:
                top: dict[str, float] = self._ask(COMPLETIONS, {**body, "seed": 0}, read=_top_logprob)
            except Restarted as error:
                raise self._unfit(f"completes nothing ({error})") from error
            likely.append(max(top.values()))
        if abs(likely[0] - likely[1]) < 1e-6:
            raise self._unfit("returns log-probabilities without the temperature")

    # -- weights -----------------------------------------------------------------------------------

    def sync(self) -> None:
        """Give the student's weights, as they are now, to the server; all ranks must call.

        Raises:
            RolloutError: it does not answer, or cannot read them.
        """
        self.weights_version = self._finished_steps()
        self._syncs += 1
        self._tag = f"{self._run}-{self.weights_version}-{self._syncs}"
        try:
            if self._accelerator.is_main_process:
                self._folder.mkdir(parents=True, exist_ok=True)
                if self._with_adapter:
                    self._write_adapter()
                    self._load_adapter()
                else:
                    self._send_weights()
        finally:
            self._accelerator.wait_for_everyone()

    def _write_adapter(self) -> None:
        common.save_adapter(self.model, self._folder / self._tag)
        older = sorted(self._folder.iterdir(), key=lambda path: path.stat().st_mtime)[:-ADAPTERS_KEPT]
        for path in older:
            shutil.rmtree(path, ignore_errors=True)
            try:
                body = {"lora_name": path.name}
                self.client.ask(Request("/v1/unload_lora_adapter", body, retry=False, sentence=True))
            except (Refused, Unavailable):
                logger.debug("The server did not know the adapter %s any more.", path.name)

    def _load_adapter(self) -> None:
        body = {"lora_name": self._tag, "lora_path": str(self._folder / self._tag)}
        refusal = f"does not load the adapter in {self._folder}"
        self._ask("/v1/load_lora_adapter", body, done="already", sentence=True, refusal=refusal)

    def _send_weights(self) -> None:
        file = self._folder / "weights.safetensors"
        refusal = f"does not take over the weights in {file}"

        start = Request("/start_weight_update", {}, done="already active")
        try:
            common.save_full_weights(self.model, file)
            self._ask(start.path, start.body, done=start.done, refusal=refusal)
            # One that fails ends the update that was started.
            self._ask("/update_weights", {"update_info": {"path": str(file)}}, again=start, refusal=refusal)
            self._ask(
                "/finish_weight_update",
                {"weight_version": self._tag},
                done="without a matching start",
                refusal=refusal,
            )
            # keys and values of the old weights
            self._ask("/reset_prefix_cache", {}, read=_cleared, refusal=refusal)
        finally:
            file.unlink(missing_ok=True)  # a whole model: written anew for a server that was started anew

    def _check_version(self) -> None:
        """Check that the server holds this run's weights.

        All weights live in the server alone: one that was started anew, or another run's, must not
        go unnoticed.
        """
        if self._with_adapter or not self._tag:
            return  # an adapter's name is asked for with every request
        held = (self._ask("/weight_info", method="GET", refusal="cannot tell its weights") or {}).get(
            "weight_version"
        )
        if held != self._tag:
            raise Restarted(f"it holds weights {held!r} instead of {self._tag!r}")

    # -- completions -------------------------------------------------------------------------------

    def generate(
        self, prompts: Sequence[Sequence[int]], keys: Sequence[NoiseKey] | None, sampling: Sampling
    ) -> list[Completion]:
        """See `Engine`.

        One request a prompt, `rollout_batch_size` of them at once; vLLM batches them.

        Before the first `sync` with the weights that the server was started with.

        Raises:
            RolloutError: the server does not answer, refuses a request (a prompt that is too long,
                say), or has lost the weights and cannot be given them again.
        """
        try:
            return self._generate(prompts, keys, sampling)
        except Restarted as error:
            if self._accelerator.num_processes > 1 or not self._tag:
                raise self._gone(error) from error
            logger.warning(
                "The vLLM server at %s was restarted (%s): it gets the weights again.",
                self.client.url,
                error,
            )
        self._base = self._ask("/v1/models", method="GET", read=_models)[0]["id"]
        if self._with_adapter:
            self._load_adapter()
        else:
            self._begin_transfer()
            self._send_weights()
        try:
            return self._generate(prompts, keys, sampling)
        except Restarted as error:
            raise self._gone(error) from error

    def _generate(
        self, prompts: Sequence[Sequence[int]], keys: Sequence[NoiseKey] | None, sampling: Sampling
    ) -> list[Completion]:
        def one(number: int) -> Request:
            prompt = list(prompts[number])
            key = None if keys is None else keys[number]
            body = {
                "model": (self._with_adapter and self._tag) or self._base,
                "prompt": prompt,
                "return_token_ids": True,
                "add_special_tokens": False,
                **common.sampling_fields(sampling, key, self.eos_ids, self.forbidden),
            }
            return Request(COMPLETIONS, body, read=lambda answer: self._completion(answer, prompt, sampling))

        written = self.client.ask_each(
            [one(number) for number in range(len(prompts))], self._requests_at_once
        )
        for found in written:
            if isinstance(found, Exception):
                raise self._error(found, COMPLETIONS, "refuses a request") from found
        self._check_version()
        return written

    def _completion(self, answer: Any, prompt: list[int], sampling: Sampling) -> Completion:
        try:
            choices = answer["choices"]
            if len(choices) != 1:
                raise BadAnswer(f"{len(choices)} answers to one prompt")
            ids, logps = choices[0]["token_ids"], choices[0]["logprobs"]["token_logprobs"]
            read = choices[0].get("prompt_token_ids")
        except (KeyError, TypeError, IndexError) as error:
            raise BadAnswer(f"an answer without {error}") from error
        if not isinstance(ids, list) or not isinstance(logps, list):
            raise BadAnswer("an answer without token ids or log-probabilities")
        if read is not None and read != prompt:
            raise BadAnswer("an answer to another prompt")
        return self._checked(ids, logps, sampling)

    def sleep(self) -> None:
        """Nothing: the server's memory is its own."""


def _remove(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    with suppress(OSError):  # another run's folder may stand beside it
        folder.parent.rmdir()


def _models(answer: Any) -> list[dict[str, Any]]:
    """What a server serves; the model it was started with first."""
    try:
        models: list[dict[str, Any]] = answer["data"]
        if not models[0]["id"]:
            raise BadAnswer("a model without a name")
    except (KeyError, TypeError, IndexError) as error:
        raise BadAnswer("no list of models") from error
    return models


def _cleared(answer: Any) -> None:
    if not isinstance(answer, dict) or answer.get("success") is not True:
        raise BadAnswer("that its cache is in use")


def _top_logprob(answer: Any) -> dict[str, float]:
    try:
        top: dict[str, float] = answer["choices"][0]["logprobs"]["top_logprobs"][0]
        max(top.values())
    except (KeyError, TypeError, IndexError, ValueError) as error:
        raise BadAnswer("no log-probabilities") from error
    return top
