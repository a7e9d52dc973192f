"""Recognises a model's configuration by the names and shapes of its tensors."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping

from sparsesam_jax.checkpoints.errors import CONFIG_HINT, ConversionError
from sparsesam_jax.checkpoints.rules import matches, numbers
from sparsesam_jax.config import ImageEncoderConfig, SamConfig

Shapes = Mapping[str, tuple[int, ...]]

_BLOCK = "image_encoder.blocks.{#}"
_REL_POS = f"{_BLOCK}.attn.{{rel_pos_h|rel_pos_w}}"
_LAYER = "mask_decoder.transformer.layers.{#}"
_HQ = ("mask_decoder.hf_", "mask_decoder.compress_vit_feat.", "mask_decoder.embedding_")

# A size -> the tensors (Meta's names) and the axes that show it. Several, so that a single tensor
# that is missing or wrongly shaped is reported as such instead of changing the configuration.
_EVIDENCE: dict[str, tuple[tuple[str, int], ...]] = {
    "embed_dim": ((f"{_BLOCK}.{{norm1|norm2}}.{{weight|bias}}", 0), ("image_encoder.pos_embed", 3)),
    "head_dim": ((_REL_POS, 1),),
    "patch_size": (
        ("image_encoder.patch_embed.proj.weight", 2),
        ("image_encoder.patch_embed.proj.weight", 3),
    ),
    "grid": (("image_encoder.pos_embed", 1), ("image_encoder.pos_embed", 2)),
    "mlp_dim": ((f"{_BLOCK}.mlp.lin1.{{weight|bias}}", 0),),
    "out_chans": (("image_encoder.neck.{1|3}.{weight|bias}", 0),),
    "mask_in_chans": (("prompt_encoder.mask_downscaling.4.{weight|bias}", 0),),
    "mask_tokens": (("mask_decoder.mask_tokens.weight", 0),),
    "decoder_mlp_dim": ((f"{_LAYER}.mlp.lin1.{{weight|bias}}", 0),),
    "iou_head_hidden_dim": (("mask_decoder.iou_prediction_head.layers.0.{weight|bias}", 0),),
}

# Stands in where a checkpoint lacks all evidence of a size. The absence is an error in any case;
# with a guess, that error lists everything else that is wrong too.
_GUESSES = {
    "embed_dim": 768,
    "head_dim": 1,
    "patch_size": 16,
    "grid": 64,
    "mlp_dim": 3072,
    "out_chans": 256,
    "mask_in_chans": 16,
    "mask_tokens": 4,
    "decoder_mlp_dim": 2048,
    "iou_head_hidden_dim": 256,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hints:
    """What shapes cannot always tell, where something else (Hugging Face's config.json) says it.

    Attributes:
        attention: Side of an attention window in tokens and the blocks with global attention.
        decoder_num_heads: No shape shows it; all published checkpoints have 8.
    """

    attention: tuple[int, tuple[int, ...]] | None = None
    decoder_num_heads: int = 8


def recognise(shapes: Shapes, hints: Hints | None = None) -> SamConfig:
    """The configuration that a checkpoint's tensors show.

    Args:
        shapes: Meta's name -> PyTorch's shape.
        hints: What else is known.

    Returns:
        The configuration. Whether every tensor agrees with it is for the caller to check.

    Raises:
        ConversionError: The shapes leave it open, or fit no model.
    """
    hints = hints or Hints()
    size = {name: _vote(shapes, name) for name in _EVIDENCE}
    lengths = _rel_pos_lengths(shapes)
    size["grid"] = _grid(size["grid"], lengths)
    if size["embed_dim"] % size["head_dim"]:
        raise ConversionError(
            f"the number of heads cannot be told: width {size['embed_dim']} is no multiple of the "
            f"relative positions' width {size['head_dim']}; {CONFIG_HINT}"
        )
    window_size, global_blocks = hints.attention or _attention(lengths, size["grid"])
    try:
        encoder = ImageEncoderConfig(
            embed_dim=size["embed_dim"],
            depth=_count(shapes, "image_encoder.blocks."),
            num_heads=size["embed_dim"] // size["head_dim"],
            global_attn_indexes=global_blocks,
            image_size=size["grid"] * size["patch_size"],
            patch_size=size["patch_size"],
            window_size=window_size,
            mlp_ratio=_ratio(size["mlp_dim"], size["embed_dim"]),
            out_chans=size["out_chans"],
        )
        return SamConfig(
            image_encoder=encoder,
            mask_in_chans=size["mask_in_chans"],
            num_multimask_outputs=size["mask_tokens"] - 1,
            decoder_depth=_count(shapes, "mask_decoder.transformer.layers."),
            decoder_num_heads=hints.decoder_num_heads,
            decoder_mlp_dim=size["decoder_mlp_dim"],
            iou_head_depth=_count(shapes, "mask_decoder.iou_prediction_head.layers.") or 3,
            iou_head_hidden_dim=size["iou_head_hidden_dim"],
            hq=any(name.startswith(_HQ) for name in shapes),
        )
    except ValueError as error:
        raise ConversionError(f"the shapes fit no model: {error}; {CONFIG_HINT}") from error


def _vote(shapes: Shapes, name: str) -> int:
    votes = Counter(
        shape[axis]
        for template, axis in _EVIDENCE[name]
        for key, shape in shapes.items()
        if matches(template, key) and len(shape) > axis and shape[axis] > 0
    )
    return votes.most_common(1)[0][0] if votes else _GUESSES[name]


def _count(shapes: Shapes, prefix: str) -> int:
    """One more than the largest number that follows the prefix."""
    texts = {name.removeprefix(prefix).split(".")[0] for name in shapes if name.startswith(prefix)}
    # A number above that of all tensors is a stray name, which must not size a model.
    counts = [int(text) + 1 for text in texts if text.isdecimal() and len(text) <= 6]
    return max((count for count in counts if count <= len(shapes)), default=0)


def _rel_pos_lengths(shapes: Shapes) -> dict[int, list[int]]:
    """Block -> rows of its two tables of relative positions."""
    lengths: dict[int, list[int]] = {}
    for name, shape in shapes.items():
        if matches(_REL_POS, name) and len(shape) == 2 and shape[0] % 2:
            lengths.setdefault(numbers(_REL_POS, name)[0], []).append(shape[0])
    return lengths


def _grid(grid: int, lengths: dict[int, list[int]]) -> int:
    """The token grid's side, which relative positions may tell better than `pos_embed`.

    Where a checkpoint has two kinds of blocks and `pos_embed` fits neither, `pos_embed` is the one
    that is missing or of a wrong shape.
    """
    counts = Counter(length for pair in lengths.values() for length in pair)
    if len(counts) > 1 and 2 * grid - 1 not in counts:
        return (max(length for length, _ in counts.most_common(2)) + 1) // 2
    return grid


def _attention(lengths: dict[int, list[int]], grid: int) -> tuple[int, tuple[int, ...]]:
    """The window's side and the global blocks: windows have 2 w - 1 rows, the grid 2 g - 1."""
    global_blocks = tuple(sorted(b for b, pair in lengths.items() if 2 * grid - 1 in pair))
    windowed = Counter(
        length for b, pair in lengths.items() if b not in global_blocks for length in pair
    )
    if windowed:
        return (windowed.most_common(1)[0][0] + 1) // 2, global_blocks
    if global_blocks:
        raise ConversionError(
            f"the shapes are ambiguous: all relative positions have {2 * grid - 1} rows, so blocks "
            f"may attend globally or in windows of {grid}; {CONFIG_HINT}"
        )
    return 14, ()


def _ratio(mlp_dim: int, embed_dim: int) -> float:
    """A ratio from which the configuration computes exactly this width."""
    ratio = mlp_dim / embed_dim
    # int() cuts off: a quotient rounded down would lose one.
    return ratio if int(embed_dim * ratio) == mlp_dim else math.nextafter(ratio, math.inf)
