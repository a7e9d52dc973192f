"""Draws masks over photos and block layouts as pictures, with Pillow alone."""

from __future__ import annotations

import colorsys
import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, UInt8
from PIL import Image, ImageDraw, ImageFont

from pallas_kernels import BlockLayout
from sparsesam_jax.predict.prompts import Prompt

Colour = tuple[int, int, int]

MASK_COLOURS: tuple[Colour, ...] = (
    (0, 133, 255),
    (255, 194, 10),
    (220, 60, 160),
    (0, 190, 120),
    (255, 110, 60),
    (140, 100, 255),
)
POINT_COLOURS: tuple[Colour, Colour] = ((230, 30, 30), (40, 220, 60))  # background, foreground
BAR, DIAGONAL, SKIPPED = (0, 133, 255), (255, 194, 10), (232, 234, 238)
_GOLDEN = (5**0.5 - 1) / 2
_INK: Colour = (20, 20, 20)
_PAPER: Colour = (255, 255, 255)


def draw_masks(
    image: UInt8[np.ndarray, "height width 3"],
    masks: Sequence[Bool[np.ndarray, "height width"]],
    prompts: Sequence[Prompt],
) -> Image.Image:
    """The image under one tinted mask a prompt, and the prompts' points and boxes.

    Args:
        image: RGB.
        masks: One a prompt; later ones lie on top.
        prompts: What the masks were asked for, each drawn in its mask's colour.
    """
    stroke = max(1, round(math.hypot(*image.shape[:2]) / 300))
    pixels = image.astype(np.float32)
    colours = [np.array(_mask_colour(index), np.float32) for index in range(len(masks))]
    for mask, colour in zip(masks, colours, strict=True):
        pixels[mask] = 0.5 * image[mask] + 0.5 * colour
    for mask, colour in zip(masks, colours, strict=True):
        pixels[_outline(mask, stroke)] = colour
    picture = Image.fromarray(np.round(pixels).astype(np.uint8))
    draw = ImageDraw.Draw(picture)
    for index, prompt in enumerate(prompts):
        if prompt.box is not None:
            box = [float(value) for value in prompt.box]
            draw.rectangle(box, outline=_PAPER, width=stroke + 2)
            draw.rectangle(box, outline=_mask_colour(index), width=stroke)
        for (x, y), label in zip(prompt.points, prompt.labels, strict=True):
            around = [
                float(v) for v in (x - 3 * stroke, y - 3 * stroke, x + 3 * stroke, y + 3 * stroke)
            ]
            colour = POINT_COLOURS[int(label)]
            draw.ellipse(around, fill=colour, outline=_PAPER, width=stroke)
    return picture


def draw_all_masks(
    image: UInt8[np.ndarray, "height width 3"], masks: Sequence[Bool[np.ndarray, "height width"]]
) -> Image.Image:
    """The image under many tinted masks with outlines; smaller ones lie on top."""
    order = sorted(range(len(masks)), key=lambda index: -np.count_nonzero(masks[index]))
    label = np.zeros(image.shape[:2], np.int32)
    for number, index in enumerate(order):
        label[masks[index]] = number + 1
    # Hues a golden section apart: neighbours in size differ, however many there are.
    hues = [colorsys.hsv_to_rgb(number * _GOLDEN % 1, 0.75, 1) for number in range(len(masks))]
    colours = np.array([(0, 0, 0), *hues], np.float32) * 255
    edge = np.zeros(label.shape, bool)
    edge[1:] |= label[1:] != label[:-1]
    edge[:, 1:] |= label[:, 1:] != label[:, :-1]
    opaque = np.where(edge, 1, 0.5) * (label > 0)
    pixels = image + opaque[..., None].astype(np.float32) * (colours[label] - image)
    return Image.fromarray(np.round(pixels).astype(np.uint8))


def side_by_side(panels: Sequence[tuple[str, Image.Image]]) -> Image.Image:
    """Pictures in a row, each under its title."""
    size = max(12, round(max(picture.width for _, picture in panels) / 25))
    head, gap = 2 * size, size
    width = sum(picture.width for _, picture in panels) + gap * (len(panels) - 1)
    sheet = Image.new("RGB", (width, head + max(p.height for _, p in panels)), _PAPER)
    draw, font, left = ImageDraw.Draw(sheet), ImageFont.load_default(size), 0
    for title, picture in panels:
        draw.text((left + gap // 2, head // 2), title, fill=_INK, font=font, anchor="lm")
        sheet.paste(picture, (left, head))
        left += picture.width + gap
    return sheet


def draw_layouts(rows: Sequence[Sequence[tuple[str, BlockLayout]]]) -> Image.Image:
    """Block layouts in a grid, each under its title, and a key to the colours.

    Queries run downwards and keys to the right, both to scale in tokens: a partial block is thin.
    """
    cell = [[(title, _layout_picture(layout, 320)) for title, layout in row] for row in rows]
    sheets = [side_by_side(row) for row in cell]
    margin, key_height = 16, 40
    width = max(sheet.width for sheet in sheets) + 2 * margin
    height = sum(sheet.height + margin for sheet in sheets) + key_height
    picture = Image.new("RGB", (width, height), _PAPER)
    top = 0
    for sheet in sheets:
        picture.paste(sheet, (margin, top))
        top += sheet.height + margin
    draw, font, left = ImageDraw.Draw(picture), ImageFont.load_default(13), margin
    for colour, text in ((BAR, "bar"), (DIAGONAL, "diagonal"), (SKIPPED, "not computed")):
        draw.rectangle([left, top + 8, left + 14, top + 22], fill=colour)
        draw.text((left + 20, top + 15), text, fill=_INK, font=font, anchor="lm")
        left += 40 + round(draw.textlength(text, font=font))
    return picture


def _layout_picture(layout: BlockLayout, side: int) -> Image.Image:
    """One layout as a square of `side` pixels."""
    rows = _edges(layout.num_q_blocks, layout.block_q, layout.seq_len, side)
    cols = _edges(layout.num_kv_blocks, layout.block_kv, layout.seq_len, side)
    picture = Image.new("RGB", (side, side), _PAPER)
    draw = ImageDraw.Draw(picture)
    line = 1 if side >= 4 * max(layout.num_q_blocks, layout.num_kv_blocks) else 0
    for (row, col), computed in np.ndenumerate(layout.block_mask):
        colour = SKIPPED
        if computed:
            colour = BAR if col < layout.num_bar_blocks else DIAGONAL
        right = max(cols[col], cols[col + 1] - 1 - line)
        bottom = max(rows[row], rows[row + 1] - 1 - line)
        draw.rectangle([cols[col], rows[row], right, bottom], fill=colour)
    return picture


def _edges(count: int, block: int, seq_len: int, side: int) -> list[int]:
    """Where blocks begin and end in a picture of `side` pixels."""
    return [round(min(index * block, seq_len) * side / seq_len) for index in range(count + 1)]


def _outline(
    mask: Bool[np.ndarray, "height width"], width: int
) -> Bool[np.ndarray, "height width"]:
    """The mask's pixels within `width` of its edge; the image's border is no edge."""
    inner = mask
    for _ in range(width):
        padded = np.pad(inner, 1, mode="edge")
        inner = padded[1:-1, 1:-1] & padded[:-2, 1:-1] & padded[2:, 1:-1]
        inner = inner & padded[1:-1, :-2] & padded[1:-1, 2:]
    return mask & ~inner


def _mask_colour(index: int) -> Colour:
    return MASK_COLOURS[index % len(MASK_COLOURS)]
