"""Distributed runs: `torchrun` starts the processes, torch.distributed joins them, rank 0 writes files."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

T = TypeVar("T")

PATIENCE = timedelta(hours=12)
"""Longest time that processes wait for each other: rank 0 validates, and some encode larger pictures than others."""


@dataclass(frozen=True)
class ProcessGroup:
    """Processes of a run, seen from one of them."""

    rank: int = 0
    size: int = 1

    @property
    def is_main(self) -> bool:
        """True: this is rank 0, the process that writes files. False: another rank."""
        return self.rank == 0

    def wait(self) -> None:
        """Wait until every process has called this method."""
        if self.size > 1:
            dist.barrier()

    def gather(self, mine: T) -> list[T]:
        """Values of all processes, in the order of ranks."""
        if self.size == 1:
            return [mine]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, mine)
        return found

    def any(self, mine: bool) -> bool:
        """True: at least one process passes True. False: all pass False."""
        return any(self.gather(mine)) if self.size > 1 else mine

    def mean(self, value: Tensor) -> Tensor:
        """Mean over the processes of a tensor of one shape."""
        if self.size == 1:
            return value
        total = value.clone()
        dist.all_reduce(total)
        return total / self.size

    def wrap(self, module: nn.Module) -> nn.Module:
        """Wrap a module so that its backward pass averages gradients over the processes.

        Frozen tensors are equal in every process and are ignored, whatever their device.
        """
        if self.size == 1:
            return module
        frozen = [name for name, tensor in module.named_parameters() if not tensor.requires_grad]
        buffers = [name for name, _ in module.named_buffers()]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, [*frozen, *buffers])
        return DistributedDataParallel(module, gradient_as_bucket_view=True)

    def split(self, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        """The optimizer under ZeroRedundancyOptimizer: each process updates its shard and broadcasts the result."""
        if self.size == 1:
            return optimizer
        from torch.distributed.optim import ZeroRedundancyOptimizer  # takes a second to import

        return ZeroRedundancyOptimizer(optimizer.param_groups, type(optimizer))

    def whole_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """Full `state_dict` of the optimizer on rank 0, {} elsewhere. Every process must call this method."""
        if hasattr(optimizer, "consolidate_state_dict"):  # `split`
            optimizer.consolidate_state_dict(to=0)
        return optimizer.state_dict() if self.is_main else {}

    def without_exchange(self, module: nn.Module, off: bool) -> AbstractContextManager[None]:
        """Context in which gradients are not averaged over the processes if `off`: for all but the
        last pass of a step.
        """
        if off and isinstance(module, DistributedDataParallel):
            return module.no_sync()
        return contextlib.nullcontext()


def together(group: ProcessGroup, open_data: Callable[[], T]) -> T:
    """Run `open_data` in every process: first in rank 0, then in one process of each other machine, then in the rest.

    Later ones find the facts of the earlier ones in the index on disk. Raises the errors of `open_data`; where another
    process fails, ValueError with its message.
    """
    local = int(os.environ.get("LOCAL_RANK", "0"))
    turn = 0 if group.is_main else 1 if local == 0 else 2
    found: list[T] = []
    for now in range(3 if group.size > 1 else 1):
        failure: Exception | None = None
        if now == turn:
            try:
                found.append(open_data())
            except Exception as error:
                failure = error
        words = [text for text in group.gather(str(failure) if failure else "") if text]
        if failure is not None:
            raise failure
        if words:
            raise ValueError(words[0])
    return found[0]


@contextlib.contextmanager
def join_group() -> Iterator[ProcessGroup]:
    """Group that `torchrun` describes in the environment; a group of one without it."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield ProcessGroup()
        return
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if torch.cuda.is_available():
        torch.cuda.set_device(local)
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo", timeout=PATIENCE)
    try:
        yield ProcessGroup(dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()
