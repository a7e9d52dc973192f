"""Forms in which masks are returned: booleans, packed bits, or COCO's run lengths.

`binary`: bool [P, K, height, width]. `packed`: uint8 [P, K, height, ceil(width / 8)], which
`np.unpackbits(packed, axis=-1, count=width)` undoes. `rle`: P lists of K `RunLengths`.
A mask of 12 megapixels is 12 MB as booleans, 1.5 MB packed, and some kilobytes as run lengths.
"""

from __future__ import annotations

from typing import Literal, TypedDict, get_args

import numpy as np
from jaxtyping import Bool, Int, UInt8

MaskFormat = Literal["binary", "packed", "rle"]

_CHARACTER_BITS = 5  # of a number in one character of COCO's text, behind the bit for "more"
_MORE, _SIGN, _FIRST_CHARACTER = 0x20, 0x10, 48


class RunLengths(TypedDict):
    """A mask as `pycocotools.mask.encode` returns it: size (height, width) and COCO's text."""

    size: list[int]
    counts: bytes


def check_mask_format(mask_format: str, *, return_logits: bool) -> None:
    """Raise ValueError unless this is a format, and one that logits have if they are wanted."""
    if mask_format not in get_args(MaskFormat):
        expected = ", ".join(get_args(MaskFormat))
        raise ValueError(f"mask_format must be one of {expected}; got {mask_format!r}")
    if return_logits and mask_format != "binary":
        raise ValueError(f"mask_format must be 'binary' with return_logits, got {mask_format!r}")


def encode_rle(mask: Bool[np.ndarray, "height width"]) -> RunLengths:
    """A mask's run lengths as COCO's text, byte for byte as `pycocotools.mask.encode` has them."""
    return {"size": list(mask.shape), "counts": rle_text(run_lengths(mask))}


def encode_packed(packed: UInt8[np.ndarray, "width bytes"], size: tuple[int, int]) -> RunLengths:
    """The same of a mask packed by `columns`, see `transforms.Packing`."""
    return {"size": list(size), "counts": rle_text(packed_run_lengths(packed, size, (0, 0)))}


def run_lengths(mask: Bool[np.ndarray, "height width"]) -> Int[np.ndarray, " runs"]:
    """Lengths of the runs of a mask, column after column; the first is one of zeros."""
    flat = mask.T.reshape(-1)
    changes = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    start = [0, 0] if flat.size and flat[0] else [0]
    return np.diff(np.concatenate([start, changes, [flat.size]]))


def packed_run_lengths(
    packed: UInt8[np.ndarray, "width bytes"], size: tuple[int, int], corner: tuple[int, int]
) -> Int[np.ndarray, " runs"]:
    """The same of a mask whose pixels are bits, from the few words in which they change.

    Args:
        packed: A mask of a part of the photo, packed by `columns`, see `transforms.Packing`.
        size: The photo's height and width.
        corner: Column and row of the photo where the part begins.
    """
    words = packed.view("<u8").reshape(-1)
    before = np.concatenate([np.zeros(1, np.uint64), words[:-1] >> np.uint64(63)])
    changes = words ^ (words << np.uint64(1) | before)
    busy = np.flatnonzero(changes)
    bits = np.unpackbits(changes[busy].astype("<u8").view(np.uint8), bitorder="little")
    word, bit = np.nonzero(bits.reshape(-1, 64))
    column, row = np.divmod(busy[word] * 64 + bit, 8 * packed.shape[1])
    # A column ends with zeros, so that changes are begin and end of a run in turns.
    places = (column + corner[0]) * size[0] + row + corner[1]
    starts, ends = places[::2], places[1::2]
    apart = starts[1:] != ends[:-1]
    if len(starts):
        starts, ends = starts[np.append(True, apart)], ends[np.append(apart, True)]
    pixels = size[0] * size[1]
    edges = np.stack([starts, ends], 1).reshape(-1)
    lengths = np.diff(np.concatenate([[0], edges, [pixels]]))
    return lengths[:-1] if len(edges) and edges[-1] == pixels else lengths


def rle_text(lengths: Int[np.ndarray, " runs"]) -> bytes:
    """COCO's text of run lengths: differences to the last but one, five bits a character."""
    rest = lengths.astype(np.int64)
    rest[3:] -= lengths[1:-2]
    characters, used = [], []
    more = np.ones(len(rest), bool)
    while more.any():
        used.append(more)
        bits = rest & (2**_CHARACTER_BITS - 1)
        rest = rest >> _CHARACTER_BITS
        # What is left is only the sign, and the sign is the last bit written: it is whole.
        more = more & np.where(bits & _SIGN, rest != -1, rest != 0)
        characters.append(bits + more * _MORE + _FIRST_CHARACTER)
    if not characters:
        return b""
    table, used_table = np.stack(characters, 1), np.stack(used, 1)
    return table[used_table].astype(np.uint8).tobytes()
