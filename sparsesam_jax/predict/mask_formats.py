"""Forms in which masks are returned: booleans, packed bits, or COCO's run lengths.

`binary`: bool [P, K, height, width]. `packed`: uint8 [P, K, height, ceil(width / 8)], which
`np.unpackbits(packed, axis=-1, count=width)` undoes. `rle`: P lists of K `RunLengths`.
A mask of 12 megapixels is 12 MB as booleans, 1.5 MB packed, and some kilobytes as run lengths.
"""

from __future__ import annotations

from typing import Literal, TypedDict, get_args

import numpy as np
from jaxtyping import Bool, Int

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


def run_lengths(mask: Bool[np.ndarray, "height width"]) -> Int[np.ndarray, " runs"]:
    """Lengths of the runs of a mask, column after column; the first is one of zeros."""
    flat = mask.T.reshape(-1)
    changes = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    start = [0, 0] if flat.size and flat[0] else [0]
    return np.diff(np.concatenate([start, changes, [flat.size]]))


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
