"""One shard of a Zarr v3 array, written photo by photo.

Libraries write a shard of Zarr's `sharding_indexed` codec from one array in memory, which is a
gigabyte for 512 photos. The format lets chunks follow one another in any order, with their places
in a table behind them. So a shard can be written as its photos come, in constant memory; Zarr's
libraries read it (https://zarr-specs.readthedocs.io, sharding codec v1.0).
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

_ABSENT = np.uint64(2**64 - 1)  # place and size of a chunk that is all zeros


@dataclasses.dataclass(frozen=True, kw_only=True)
class ArrayLayout:
    """An array [rows, side, side, channels] of features, a Zarr shard for every shard of photos.

    A chunk is 8 x 8 tokens of a photo: what `padding="crop"` leaves out are whole chunks, which
    take no space.

    Attributes:
        rows: Photos.
        shard_size: Photos of a shard.
        side: Side of the padded square's features.
        channels: Of the features.
        dtype: `float16` or `bfloat16`.
    """

    rows: int
    shard_size: int
    side: int
    channels: int
    dtype: str

    @property
    def unit(self) -> int:
        """Side of a chunk."""
        return min(8, self.side)

    @property
    def chunks(self) -> int:
        """Chunks along a side."""
        return -(-self.side // self.unit)

    def metadata(self) -> dict[str, Any]:
        """The array's `zarr.json`."""
        little = {"name": "bytes", "configuration": {"endian": "little"}}
        sharding = {
            "chunk_shape": [1, self.unit, self.unit, self.channels],
            "codecs": [little],
            "index_codecs": [little],
            "index_location": "end",
        }
        width = self.chunks * self.unit
        shape = [self.shard_size, width, width, self.channels]
        return {
            "zarr_format": 3,
            "node_type": "array",
            "shape": [self.rows, self.side, self.side, self.channels],
            "data_type": self.dtype,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": shape}},
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
            "fill_value": 0.0,
            "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
            "dimension_names": ["photo", "row", "column", "channel"],
            "attributes": {},
        }

    def check(self, features: np.ndarray) -> None:
        """Raise ValueError unless features [rows, columns, channels] fit a photo's place."""
        height, width, channels = features.shape
        fits = height <= self.side and width <= self.side and channels == self.channels
        if not fits or features.dtype != np.dtype(getattr(ml_dtypes, self.dtype, self.dtype)):
            raise ValueError(
                f"features must be {self.dtype} [<= {self.side}, <= {self.side}, {self.channels}], "
                f"got {features.dtype} {features.shape}"
            )


class ArrayShard:
    """A shard that is being written.

    Args:
        file: Where to.
        layout: The array's.
    """

    def __init__(self, file: BinaryIO, layout: ArrayLayout):
        self._file, self._layout, self._size = file, layout, 0
        chunks = (layout.shard_size, layout.chunks, layout.chunks, 2)
        self._table = np.full(chunks, _ABSENT, "<u8")

    def add(self, place: int, chunks: np.ndarray) -> None:
        """Write the photo at a place of the shard, as `chunked` returns it."""
        rows, cols = chunks.shape[:2]
        size = chunks[0, 0].nbytes
        for number, (row, col) in enumerate(itertools.product(range(rows), range(cols))):
            self._table[place, row, col] = (self._size + number * size, size)
        self._file.write(chunks.view(np.uint8).data)
        self._size += chunks.nbytes

    def finish(self) -> None:
        """Write the table."""
        self._file.write(self._table.tobytes())
        self._file.flush()


def chunked(features: np.ndarray, layout: ArrayLayout) -> np.ndarray:
    """Features [rows, columns, channels] as the chunks of a shard, one behind the other.

    Returns:
        [chunk rows, chunk columns, unit, unit, channels], with zeros where chunks stick out.
    """
    layout.check(features)
    unit, (height, width, channels) = layout.unit, features.shape
    rows, cols = -(-height // unit), -(-width // unit)
    if (rows * unit, cols * unit) != (height, width):
        edges = ((0, rows * unit - height), (0, cols * unit - width), (0, 0))
        features = np.pad(features, edges)
    blocks = features.reshape(rows, unit, cols, unit, channels)
    return np.ascontiguousarray(blocks.transpose(0, 2, 1, 3, 4))
