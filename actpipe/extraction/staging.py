"""Bring rows to where they can be written, without making the forward pass wait."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch


@dataclass(frozen=True)
class Landing:
    """Rows under way to the host's memory."""

    n_bytes: int
    _data: torch.Tensor
    _arrived: Any = None
    """The event after the copy, where there is one."""
    _home: Staging | None = None

    @contextmanager
    def bytes(self) -> Iterator[npt.NDArray[np.uint8]]:
        """Wait for the rows and lend their bytes; afterwards the memory may be used for others."""
        if self._arrived is not None:
            self._arrived.synchronize()
        yield self._data.numpy()[: self.n_bytes]
        if self._home is not None:
            self._home.give_back(self._data)


class Staging:
    """Copies rows off a CUDA device in a stream of its own, into page-locked buffers that are used again.

    The next batch runs meanwhile. Rows that are on the host already are taken as they are. There are as
    many buffers as there are rows under way, which whoever hands rows on must bound.
    """

    def __init__(self) -> None:
        self._free: defaultdict[int, list[torch.Tensor]] = defaultdict(list)
        self._streams: dict[torch.device, Any] = {}
        self._lock = threading.Lock()

    def send(self, rows: torch.Tensor) -> Landing:
        """Start moving rows to the host; they must not be changed afterwards."""
        if rows.device.type != "cuda":
            here = rows.cpu().reshape(-1).contiguous().view(torch.uint8)
            return Landing(here.numel(), here)
        flat = rows.reshape(-1).contiguous().view(torch.uint8)
        buffer, stream = self._buffer(flat.numel()), self._stream(flat.device)
        stream.wait_stream(torch.cuda.current_stream(flat.device))
        with torch.cuda.stream(stream):
            buffer[: flat.numel()].copy_(flat, non_blocking=True)
            arrived = stream.record_event()
        flat.record_stream(stream)
        return Landing(flat.numel(), buffer, arrived, self)

    def give_back(self, buffer: torch.Tensor) -> None:
        """Take a buffer whose bytes were written."""
        with self._lock:
            self._free[buffer.numel()].append(buffer)

    def _buffer(self, n_bytes: int) -> torch.Tensor:
        size = 1 << max(12, (n_bytes - 1).bit_length())
        with self._lock:
            if self._free[size]:
                return self._free[size].pop()
        return torch.empty(size, dtype=torch.uint8, pin_memory=True)

    def _stream(self, device: torch.device) -> Any:
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        return self._streams[device]
