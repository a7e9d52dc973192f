"""The images on which a method does best and worst, their masks laid over them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from sparsesam_jax.evaluation.candidates import DENSE, Candidate
from sparsesam_jax.evaluation.prompts import mask_prompt
from sparsesam_jax.evaluation.rows import RowFile
from sparsesam_jax.evaluation.runner import Evaluation
from sparsesam_jax.predict.image_files import write_images
from sparsesam_jax.predict.overlay import draw_masks, side_by_side

_EACH = 3  # best and worst images of a picture
_SIDE = 480  # longest side of a photo in it


def write_extremes(evaluation: Evaluation, file: RowFile, out: Path) -> list[Path]:
    """Write `best_worst_METHOD.png` for every method at its lowest density.

    Best and worst are the images whose IoU changes most against the dense encoder. Each is shown
    with the ground truth, the dense mask and the method's.

    Returns:
        What was written.
    """
    lowest: dict[str, Candidate] = {}
    for candidate in evaluation.options.candidates:
        if candidate.is_dense:
            continue
        known = lowest.setdefault(candidate.method, candidate)
        if candidate.density < known.density:
            lowest[candidate.method] = candidate
    pictures = {
        out / f"best_worst_{method}.png": _picture(evaluation, file, candidate)
        for method, candidate in lowest.items()
    }
    write_images(pictures)
    return list(pictures)


def _picture(evaluation: Evaluation, file: RowFile, candidate: Candidate) -> Image.Image:
    pairs = {pair.name: pair for pair in evaluation.pairs if pair.name not in evaluation.problems}

    def row(of: Candidate, name: str):
        return file.found[(*of[:2], name)]

    change = {name: row(candidate, name).iou - row(DENSE, name).iou for name in pairs}
    ranked = sorted(change, key=lambda name: (change[name], name))
    each = min(_EACH, (len(ranked) + 1) // 2)
    shown = list(dict.fromkeys([*ranked[:each], *ranked[::-1][:each]]))
    sheets = []
    size = evaluation.options.batch
    for start in range(0, len(shown), size):
        names = shown[start : start + size]
        photos = evaluation.read([pairs[name] for name in names])
        dense, new = evaluation.predict(DENSE, photos), evaluation.predict(candidate, photos)
        for index, photo in enumerate(photos):
            masks = {
                f"{photo.name}, ground truth": photo.mask,
                f"dense {row(DENSE, photo.name).iou:.3f}": dense.masks[index],
                f"{candidate.method} {candidate.density:g}: "
                f"{row(candidate, photo.name).iou:.3f} ({change[photo.name]:+.3f})": new.masks[
                    index
                ],
            }
            prompt = mask_prompt(photo.mask, evaluation.options.prompts)
            panels = [
                (title, _small(draw_masks(photo.image, [mask], [prompt])))
                for title, mask in masks.items()
            ]
            sheets.append(side_by_side(panels))
    return _stack(sheets)


def _small(picture: Image.Image) -> Image.Image:
    """The picture with its longest side at `_SIDE`."""
    scale = _SIDE / max(picture.size)
    width, height = (max(1, round(side * scale)) for side in picture.size)
    return picture.resize((width, height), Image.Resampling.LANCZOS)


def _stack(sheets: Sequence[Image.Image]) -> Image.Image:
    """Pictures one below the other."""
    width = max(sheet.width for sheet in sheets)
    stacked = Image.new("RGB", (width, sum(sheet.height for sheet in sheets)), "white")
    top = 0
    for sheet in sheets:
        stacked.paste(sheet, (0, top))
        top += sheet.height
    return stacked
