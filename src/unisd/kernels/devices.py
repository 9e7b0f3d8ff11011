"""Answers what a device is good for."""

from __future__ import annotations

import torch


def shares_host(device: torch.device) -> bool:
    """Whether it computes with this process's threads, in this process's memory."""
    return device.type == "cpu"


def gains_from_bf16(device: torch.device) -> bool:
    """Whether it is an accelerator that multiplies in bfloat16 itself."""
    from unisd.models.load import native_bf16  # not for vLLM's processes, which ask other questions

    return device.type != "cpu" and native_bf16()
