"""How rows become batches, and what happens to a batch on its way out."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from actpipe.feed.normalizing import NORMALIZATIONS, Normalize
from actpipe.feed.order import Deal, Order, Shuffle


@dataclass(frozen=True, kw_only=True)
class FeedSettings:
    """How rows become batches; see `ActivationLoader`."""

    batch_size: int
    shuffle: Shuffle
    seed: int
    drop_last: bool
    block_rows: int
    buffer_rows: int
    rank: int
    world_size: int

    def __post_init__(self) -> None:
        for name in ("batch_size", "block_rows", "buffer_rows", "world_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.shuffle not in ("rows", "blocks", None):
            raise ValueError(f"shuffle must be 'rows', 'blocks' or None, got {self.shuffle!r}")
        if self.seed < 0:
            raise ValueError(f"seed must not be negative, got {self.seed}")
        if not 0 <= self.rank < self.world_size:
            raise ValueError(f"rank {self.rank} is not one of {self.world_size}; ranks count from 0")

    def order(self, n_rows: int, epoch: int) -> Order:
        """Return the order of one epoch."""
        return Order(self.shuffle, n_rows, min(self.block_rows, n_rows), self.seed, epoch)

    def deal(self, n_rows: int, n_workers: int) -> Deal:
        """Return how the batches of an epoch are dealt out."""
        group_batches = max(1, self.buffer_rows // self.batch_size) if self.shuffle == "blocks" else 1
        return Deal(n_rows, self.batch_size, group_batches, self.world_size, n_workers, self.drop_last)


@dataclass(frozen=True, kw_only=True)
class Delivery:
    """What happens to a batch on its way out; see `ActivationLoader`."""

    device: torch.device
    dtype: torch.dtype | None
    read_ahead: int
    normalize: Normalize

    @classmethod
    def of(
        cls, device: torch.device | str, dtype: torch.dtype | str | None, *, read_ahead: int, normalize: Normalize
    ) -> Delivery:
        """Return a delivery; devices and element types may be given by name."""
        if isinstance(dtype, str):
            dtype = getattr(torch, dtype, None) or dtype
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise ValueError(f"dtype must be a floating type of torch, got {dtype!r}")
        if normalize not in (*NORMALIZATIONS, None):
            raise ValueError(f"normalize must be one of {', '.join(NORMALIZATIONS)} or None, got {normalize!r}")
        if read_ahead < 0:
            raise ValueError(f"read_ahead must not be negative, got {read_ahead}")
        if dtype is None and normalize is not None:
            dtype = torch.float32
        return cls(device=torch.device(device), dtype=dtype, read_ahead=read_ahead, normalize=normalize)


def this_rank(rank: int | None, world_size: int | None) -> tuple[int, int]:
    """Return rank and number of ranks: as given, as torch.distributed says, or the only one."""
    if (rank is None) != (world_size is None):
        raise ValueError(f"give both rank and world_size or neither, got {rank} and {world_size}")
    if rank is not None and world_size is not None:
        return rank, world_size
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1
