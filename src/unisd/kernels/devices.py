"""Answers what a device is good for."""

from __future__ import annotations

import torch


def shares_host(device: torch.device) -> bool:
    """Whether it computes with this process's threads, in this process's memory."""
    return device.type == "cpu"
