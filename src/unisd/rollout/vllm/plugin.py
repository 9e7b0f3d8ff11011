"""Announces our weight-transfer backend to vLLM; imports nothing heavy.

vLLM loads it by the entry point `vllm.general_plugins`.
"""

from __future__ import annotations

BACKEND = "unisd"


def register() -> None:
    """Tell vLLM, in this process, of the backend; again does nothing."""
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    try:
        WeightTransferEngineFactory.register_engine(BACKEND, "unisd.rollout.vllm.transfer", "UnisdTransfer")
    except ValueError:
        return  # it knows already
