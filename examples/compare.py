"""Sparse beside dense on a folder of photos: how much the masks differ, and the encoder's time.

    python examples/compare.py PHOTOS --density 0.4

Every photo is prompted with its centre. Agreement is the IoU of the sparse mask with the dense one.
With masks at hand, `sparsesam evaluate` measures quality itself.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from sparsesam_jax import Sam, SamPredictor, Sparsity
from sparsesam_jax.evaluation.metrics import iou
from sparsesam_jax.predict.image_files import read_image


def segment(predictor: SamPredictor, photo: np.ndarray) -> tuple[np.ndarray, float]:
    """The mask at the photo's centre, and the milliseconds that the encoder took."""
    start = time.perf_counter()
    predictor.set_image(photo)
    predictor.get_image_embedding().block_until_ready()
    milliseconds = 1e3 * (time.perf_counter() - start)
    height, width = photo.shape[:2]
    masks, scores, _ = predictor.predict(
        point_coords=np.array([[width / 2, height / 2]]), point_labels=np.array([1])
    )
    return masks[scores.argmax()], milliseconds


def main(arguments: Sequence[str] | None = None) -> list[float]:
    """Print a line a photo and return the agreements."""
    parser = argparse.ArgumentParser(description="Compare a sparse encoder with the dense one.")
    parser.add_argument("photos", type=Path)
    parser.add_argument("--weights", default="vit_t")
    parser.add_argument("--density", type=float, default=0.4)
    options = parser.parse_args(arguments)
    paths = sorted(path for path in options.photos.iterdir() if path.is_file())
    if not paths:
        parser.error(f"PHOTOS must be a folder with photos, got an empty one: {options.photos}")

    sam = Sam.from_pretrained(options.weights)
    dense = SamPredictor(sam)
    sparse = SamPredictor(sam.with_sparsity(Sparsity(options.density)))  # the same parameters
    for predictor in (dense, sparse):
        segment(predictor, read_image(paths[0]))  # compiles

    agreements = []
    for path in paths:
        photo = read_image(path)
        (dense_mask, dense_time), (sparse_mask, sparse_time) = (
            segment(predictor, photo) for predictor in (dense, sparse)
        )
        agreements.append(iou(dense_mask, sparse_mask))
        print(
            f"{path.name}: agreement {agreements[-1]:.3f}, "
            f"dense {dense_time:.0f} ms, sparse {sparse_time:.0f} ms"
        )
    print(f"mean agreement {np.mean(agreements):.3f}")
    return agreements


if __name__ == "__main__":
    main()
