"""Receives all weights in vLLM's processes, by its weight-transfer interface, on any device.

The backends that vLLM brings move tensors between GPUs. This one takes them where they lie: in this
process' memory (colocated), or in a safetensors file that trainer and server both reach. It is
imported in the processes of vLLM only; `plugin.register` announces it there.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from unisd.kernels.devices import shares_host


@dataclass
class InitInfo(WeightTransferInitInfo):  # type: ignore[misc]
    """Nothing to agree on beforehand."""


@dataclass
class UpdateInfo(WeightTransferUpdateInfo):  # type: ignore[misc]
    """Where the weights lie: one of the two."""

    path: str | None = None  # a safetensors file
    tensors: dict[str, Tensor] = field(default_factory=dict)  # by their names in a checkpoint


class UnisdTransfer(WeightTransferEngine[InitInfo, UpdateInfo]):  # type: ignore[misc]
    """Loads weights in the layout of a checkpoint into the running model, layer by layer.

    Everything happens in `receive_weights`, all weights in one call: what is sent again, because
    its answer was lost, is loaded again (a second time within one reload would fail), and no
    request ever meets a model that waits for its weights.
    """

    init_info_cls = InitInfo
    update_info_cls = UpdateInfo

    def init_transfer_engine(self, init_info: InitInfo) -> None:
        pass

    def start_weight_update(self) -> None:
        pass

    def receive_weights(self, update_info: UpdateInfo) -> None:
        initialize_layerwise_reload(self.model)
        try:
            self.model.load_weights(
                _from_file(update_info.path) if update_info.path else iter(update_info.tensors.items())
            )
        finally:
            finalize_layerwise_reload(self.model, self.model_config)
        if shares_host(self.device):
            # On a CPU a head is multiplied from a packed copy; one that is tied to the embeddings
            # gets no weights of its own, and is not packed again by the reload (log-probabilities
            # were 0.5 nats off).
            for module in self.model.modules():
                if isinstance(module, ParallelLMHead):
                    module.quant_method.process_weights_after_loading(module)

    def finish_weight_update(self) -> None:
        pass

    def shutdown(self) -> None:
        pass


def _from_file(path: str) -> Iterator[tuple[str, torch.Tensor]]:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        opened: Any = file
        names: list[str] = opened.keys()
        for name in names:
            yield name, opened.get_tensor(name)
