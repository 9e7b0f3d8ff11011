"""vLLM inside the training process: one engine per process, on the process' own device."""

from __future__ import annotations

import logging
import os
import random
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

from unisd.config import UniSDConfig
from unisd.errors import UserError
from unisd.http_client import BadAnswer
from unisd.kernels.devices import shares_host
from unisd.memory import available
from unisd.rollout.engine import Completion, NoiseKey, Sampling
from unisd.rollout.vllm import common
from unisd.rollout.vllm.plugin import BACKEND, register

logger = logging.getLogger(__name__)

# Read by vLLM when an engine starts. What the user has set stays.
QUIET = {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}


class ColocatedEngine(common.VllmEngine):
    """Generates with a copy of the student inside vLLM; see `build_engine` for the arguments.

    The copy holds its own weights. All of them are loaded anew at each `sync`; of a student with an
    adapter only the adapter.
    """

    def __init__(
        self,
        args: UniSDConfig,
        model: Any,
        accelerator: Accelerator,
        eos_ids: Sequence[int],
        finished_steps: Callable[[], int],
    ) -> None:
        if getattr(model, "is_quantized", False):
            raise UserError(
                "vllm_mode=colocate cannot copy quantised weights: use vllm_mode=server, or unset"
                " load_in_4bit or use_vllm."
            )
        super().__init__(args, model, accelerator, eos_ids, finished_steps)
        self._folder = tempfile.TemporaryDirectory(prefix="unisd-vllm-")
        self._adapter: Any = None  # the LoRARequest of the newest sync
        self._syncs = 0
        self._on_host = shares_host(accelerator.device)
        if args.vllm_enable_sleep_mode and self._on_host:
            logger.warning("vllm_enable_sleep_mode does nothing on a CPU.")
        self._can_sleep = args.vllm_enable_sleep_mode and not self._on_host
        self._asleep = False
        self.llm = self._start(args, accelerator)
        if not self._with_adapter:
            self.llm.init_weight_transfer_engine({"init_info": {}})

    def _start(self, args: UniSDConfig, accelerator: Accelerator) -> Any:
        for name, value in QUIET.items():
            os.environ.setdefault(name, value)
        # in this process, where it reads the student's weights
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        if self._on_host:
            os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # the threads are the trainer's
        options: dict[str, Any] = {
            "model": self._model_folder(),
            "dtype": self._dtype,
            "skip_tokenizer_init": True,
            "generation_config": "vllm",  # none of the model's own sampling defaults
            "logprobs_mode": "processed_logprobs",  # of the distribution that was drawn from
            "max_num_seqs": args.rollout_batch_size,
            "max_model_len": args.vllm_max_model_length,
            "gpu_memory_utilization": args.vllm_gpu_memory_utilization,
            "enable_sleep_mode": self._can_sleep,
            "enforce_eager": self._on_host,  # compiling for a CPU takes minutes and a C++ compiler
            "seed": args.seed,
            "use_tqdm_on_load": False,
        }
        if self._on_host and (free := available(accelerator.device)) is not None:
            options["kv_cache_memory_bytes"] = int(args.vllm_gpu_memory_utilization * free)
        if accelerator.num_processes > 1:
            # joins the group that is there, alone
            options["distributed_executor_backend"] = "external_launcher"
        with _undisturbed():
            from vllm import LLM
            from vllm.config import WeightTransferConfig

            if self._with_adapter:
                options |= {
                    "enable_lora": True,
                    "max_loras": 1,
                    "max_lora_rank": common.lora_rank(self.model),
                }
            else:
                register()
                options["weight_transfer_config"] = WeightTransferConfig(backend=BACKEND)
            try:
                return LLM(**options)
            except (ValueError, RuntimeError, OSError) as error:
                told = " ".join(str(error).split())[:300]
                raise UserError(
                    f"vLLM does not start: {told}: fix that (vllm_gpu_memory_utilization is its share of"
                    " memory, vllm_max_model_length its longest sequence), or unset use_vllm."
                ) from error

    def _model_folder(self) -> str:
        """The folder or hub id that the model came from.

        One that was built in memory is written out.
        """
        name = str(self.bare.config._name_or_path or "")
        if name:
            return name
        folder = Path(self._folder.name) / "base"
        weights = self.bare.state_dict().items()
        own = {key.replace(".base_layer.", "."): value for key, value in weights if ".lora_" not in key}
        self.bare.save_pretrained(str(folder), state_dict=own)
        return str(folder)

    def sync(self) -> None:
        """Take over the student's weights as they are now."""
        self._wake()
        self._syncs += 1
        self.weights_version = self._finished_steps()
        if self._with_adapter:
            from vllm.lora.request import LoRARequest

            folder = Path(self._folder.name) / f"adapter-{self._syncs}"
            common.save_adapter(self.model, folder)
            if self._adapter is not None:
                shutil.rmtree(self._adapter.lora_path, ignore_errors=True)
            # A new name and number: under the old ones the engine would keep what it has.
            self._adapter = LoRARequest(f"{self.weights_version}-{self._syncs}", self._syncs, str(folder))
            return
        self.llm.start_weight_update()
        self.llm.update_weights({"update_info": {"tensors": common.full_weights(self.model)}})
        self.llm.finish_weight_update(str(self.weights_version))
        self.llm.reset_prefix_cache()  # keys and values of the old weights

    def generate(
        self, prompts: Sequence[Sequence[int]], keys: Sequence[NoiseKey] | None, sampling: Sampling
    ) -> list[Completion]:
        """See `Engine`.

        The weights are those of the last `sync`; before the first, those that the engine started
        with.

        Raises:
            UserError: a prompt leaves no room for an answer.
        """
        from vllm import SamplingParams

        if not prompts:
            return []
        self._wake()
        room = self.llm.llm_engine.model_config.max_model_len - sampling.max_new_tokens
        if (longest := max(map(len, prompts))) > room:
            raise UserError(
                f"a prompt of {longest} tokens and an answer of {sampling.max_new_tokens} do not fit into"
                f" vLLM's {room + sampling.max_new_tokens}: raise vllm_max_model_length, or set"
                f" max_prompt_length to {max(room, 0)}."
            )
        requests = [
            SamplingParams(
                **common.sampling_fields(sampling, key, self.eos_ids, self.forbidden), detokenize=False
            )
            for key in (keys if keys is not None else [None] * len(prompts))
        ]
        outputs = self.llm.generate(
            [{"prompt_token_ids": list(prompt)} for prompt in prompts],
            requests,
            use_tqdm=False,
            lora_request=self._adapter,
        )
        return [self._completion(output.outputs[0], sampling) for output in outputs]

    def _completion(self, answer: Any, sampling: Sampling) -> Completion:
        ids = list(answer.token_ids)
        logps = [told[token].logprob for token, told in zip(ids, answer.logprobs, strict=True)]
        try:
            return self._checked(ids, logps, sampling)
        except BadAnswer as error:
            raise UserError(
                f"vLLM gave {error}: this version of it may not fit the model; unset use_vllm."
            ) from error

    def _wake(self) -> None:
        if self._asleep:
            self.llm.wake_up()
            self._asleep = False

    def sleep(self) -> None:
        """Give the memory of weights and cache back until the next `sync`.

        If `vllm_enable_sleep_mode`.
        """
        if self._can_sleep and not self._asleep:
            self.llm.sleep(level=1)
            self._asleep = True


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Put global random numbers and the setting of threads back.

    An engine that starts seeds the former and takes over the latter.
    """
    python, numpy, threads = random.getstate(), np.random.get_state(), torch.set_num_threads
    count = torch.get_num_threads()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_num_threads = threads
        torch.set_num_threads(count)
