"""Refusal of training on some hosts: a graph that is sent to many workers would train the same control on each."""

from __future__ import annotations

import os
from collections.abc import Mapping

NO_TRAINING = "CONTROLNEXT_NO_TRAINING"
"""Environment variable: 1 refuses training on this host, 0 allows it even on a worker."""
WORKER = "COMFYUI_IS_WORKER"
"""Environment variable that ComfyUI-Distributed sets for the workers that it starts."""


def refusal(environment: Mapping[str, str] | None = None) -> str | None:
    """Reason why this host must not train, with the remedy; None where it may.

    environment: variables by name; None uses those of this process.
    """
    known = os.environ if environment is None else environment
    chosen = known.get(NO_TRAINING, "").strip()
    if chosen not in ("", "0"):
        return (
            f"{NO_TRAINING}={chosen[:40]} in the environment of this ComfyUI forbids training here. Queue the graph on "
            "a host without it, or start this one without it."
        )
    if not chosen and known.get(WORKER, "").strip() not in ("", "0"):
        return (
            f"{WORKER} in the environment says that this ComfyUI is a worker, and each worker would train the same "
            f"control. Train on the main host; where a worker shall train, start it with {NO_TRAINING}=0."
        )
    return None
