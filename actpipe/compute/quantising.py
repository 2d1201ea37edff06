"""Keep values in one byte each, with scales from which floats come back. Needs numpy alone."""

from __future__ import annotations

from typing import Literal

import ml_dtypes
import numpy as np
from jaxtyping import Float32, Float64, Int8, Shaped, UInt8

Code = Literal["int8", "float8_e4m3"]
LARGEST: dict[Code, float] = {"int8": 127.0, "float8_e4m3": 448.0}
"""Largest value of each code."""
_FLOAT8 = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)


def channel_scales(mean_sizes: Float64[np.ndarray, " channel"]) -> Float32[np.ndarray, " channel"]:
    """Return the power of two nearest to the mean size of each channel; 1 where a channel is 0.

    Divided by these, channels are of like size, so that one that is always large does not take the
    range of its neighbours. Powers of two, because dividing by them rounds nothing.
    """
    used = np.where(mean_sizes > 0, mean_sizes, 1.0)
    exponents = np.clip(np.rint(np.log2(used)), -126, 127)
    return np.exp2(exponents).astype(np.float32)


def quantise(
    rows: Float32[np.ndarray, "row channel"], channels: Float32[np.ndarray, " channel"], block: int, code: Code
) -> tuple[Int8[np.ndarray, "row channel"] | UInt8[np.ndarray, "row channel"], Float32[np.ndarray, "row block"]]:
    """Give every row and block of channels a scale of its own, and round to the code.

    Args:
        rows: Finite values.
        channels: Scales of the channels.
        block: Channels that share a scale; the last block may be shorter.
        code: `int8`, or `float8_e4m3` as the bits of such a float.

    Returns:
        Codes, and the scale of every block of every row: the largest size in it over that of the code.
    """
    even = rows / channels
    starts = np.arange(0, rows.shape[1], block)
    scales = np.maximum.reduceat(np.abs(even), starts, axis=1) / np.float32(LARGEST[code])
    even /= np.repeat(np.where(scales > 0, scales, 1), _widths(rows.shape[1], block), axis=1)
    if code == "int8":
        return np.clip(np.rint(even, out=even), -127, 127).astype(np.int8), scales
    return np.clip(even, -448, 448).astype(ml_dtypes.float8_e4m3fn).view(np.uint8), scales


def dequantise(
    codes: Shaped[np.ndarray, "row channel"],
    scales: Float32[np.ndarray, "row block"],
    channels: Float32[np.ndarray, " channel"],
    block: int,
) -> Float32[np.ndarray, "row channel"]:
    """Undo `quantise`: code times the scale of the row's block times that of the channel."""
    rows = _FLOAT8[codes] if codes.dtype == np.uint8 else codes.astype(np.float32)
    rows *= np.repeat(scales, _widths(codes.shape[1], block), axis=1)
    rows *= channels
    return rows


def _widths(n_channels: int, block: int) -> Shaped[np.ndarray, " block"]:
    starts = np.arange(0, n_channels, block)
    return np.diff(starts, append=n_channels)
