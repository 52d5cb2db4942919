"""The challenge's shard format, shared by the data tools: 256 little-endian int32 (magic, version, token count, zeros), then uint16 tokens.

`train_gpt.py` has its own reader because it must stand alone; `tests/test_data.py` holds the two against each other.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

MAGIC = 20240520
VERSION = 1
HEADER_BYTES = 256 * 4
TOKEN_BYTES = 2


def write_shard(path: Path, tokens: np.ndarray) -> None:
    """Writes `tokens` (any integer dtype, values in 0..65535) to `path`; the file appears whole under its final name or not at all.

    Raises ValueError for a token that uint16 cannot hold.
    """
    if tokens.size and (int(tokens.min()) < 0 or int(tokens.max()) > 0xFFFF):
        raise ValueError(f"{path}: token ids must fit uint16, got {int(tokens.min())}..{int(tokens.max())}")
    header = np.zeros(256, dtype="<i4")
    header[:3] = MAGIC, VERSION, tokens.size
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    with open(partial, "wb") as file:
        file.write(header.tobytes())
        file.write(tokens.astype("<u2").tobytes())
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def check_shard(path: Path) -> int:
    """Returns the number of tokens of the shard at `path`. Raises ValueError naming what is wrong (magic, version, size) and what was expected."""
    size = path.stat().st_size
    if size < HEADER_BYTES:
        raise ValueError(f"{path}: {size} bytes is shorter than the {HEADER_BYTES}-byte header; the file is truncated or empty")
    header = np.fromfile(path, dtype="<i4", count=256)
    if header[0] != MAGIC or header[1] != VERSION:
        raise ValueError(f"{path}: magic {header[0]} version {header[1]}, expected {MAGIC} version {VERSION}; this is not a token shard")
    expected = HEADER_BYTES + TOKEN_BYTES * int(header[2])
    if header[2] < 0 or size != expected:
        raise ValueError(f"{path}: {size} bytes, but its header promises {header[2]} tokens = {expected} bytes; the file is truncated or damaged")
    return int(header[2])


def read_shard(path: Path) -> np.ndarray:
    """Returns the tokens of the shard at `path` as uint16, memory-mapped. Raises ValueError as `check_shard` does."""
    count = check_shard(path)
    if count == 0:
        return np.empty(0, dtype=np.uint16)
    return np.memmap(path, dtype="<u2", mode="r", offset=HEADER_BYTES, shape=(count,))
