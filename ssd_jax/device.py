"""This machine, in words."""

from __future__ import annotations

import functools
import os
import platform
from pathlib import Path

import jax


@functools.cache
def device_name() -> str:
    """The processor's name, where the system tells, or the accelerator's kind."""
    device = jax.devices()[0]
    if device.platform != "cpu":
        return device.device_kind
    lines = (read_text("/proc/cpuinfo") or "").splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "cpu"


@functools.cache
def processor_has(instructions: str) -> bool:
    """Whether the processor has some instructions, by the name that Linux gives them
    (``avx512f``); elsewhere it is not known to."""
    return instructions in (read_text("/proc/cpuinfo") or "").split()


def cores() -> int:
    """Processor cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def read_text(path: str) -> str | None:
    try:
        return Path(path).read_text(encoding="utf-8").strip()
    except OSError:
        return None
