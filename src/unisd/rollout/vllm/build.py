"""Which engine a run gets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator, DistributedType

from unisd.config import UniSDConfig
from unisd.errors import UserError
from unisd.rollout.engine import Engine

# inside output_dir: weights on their way to a server; a push to the hub leaves out names with _
SYNC_FOLDER = "_vllm-sync"


def build_engine(
    args: UniSDConfig,
    model: Any,
    accelerator: Accelerator,
    eos_ids: Sequence[int],
    finished_steps: Callable[[], int],
) -> Engine:
    """Build the engine that `args` asks for.

    It is ready to generate with the student's present weights after a `sync`.

    Args:
        model: the student, unwrapped; its trained weights are read at each `sync`.
        finished_steps: tells the optimizer step whose weights the student has, the version that
            completions carry.

    Raises:
        UserError: vLLM does not start, its server does not answer or was started with other
            settings, or the model is quantised.
    """
    if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        raise UserError(
            "use_vllm needs whole weights in each process: use accelerate_config=ddp, or unset use_vllm."
        )
    if args.vllm_mode == "server":
        from unisd.rollout.vllm.server import ServerEngine

        return ServerEngine(
            args, model, accelerator, eos_ids, finished_steps, Path(args.output_dir) / SYNC_FOLDER
        )
    from unisd.rollout.vllm.colocated import ColocatedEngine

    return ColocatedEngine(args, model, accelerator, eos_ids, finished_steps)
