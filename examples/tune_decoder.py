"""Tune the mask decoder on a few photos of one's own and measure it on others.

    python examples/tune_decoder.py PHOTOS MASKS --out tuned

The first 20 photos are tuned on, the next 10 are held out. The image encoder stays as it is, so
that two CPU cores suffice. `sparsesam tune` has all options.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from sparsesam_jax import Sam
from sparsesam_jax.evaluation.datasets import folder_pairs, read_photo
from sparsesam_jax.tuning.data import find, load
from sparsesam_jax.tuning.losses import Losses
from sparsesam_jax.tuning.objective import Objective
from sparsesam_jax.tuning.prompting import Prompting
from sparsesam_jax.tuning.run import MODEL, Settings, Stage, tune
from sparsesam_jax.tuning.step import Optimiser
from sparsesam_jax.tuning.validation import validate


def main(arguments: Sequence[str] | None = None) -> tuple[float, float]:
    """Return the held-out mean IoU for boxes, before and after."""
    parser = argparse.ArgumentParser(description="Tune the mask decoder on a few photos.")
    parser.add_argument("photos", type=Path)
    parser.add_argument("masks", type=Path)
    parser.add_argument("--weights", default="vit_t")
    parser.add_argument("--count", type=int, default=20, help="photos to tune on")
    parser.add_argument("--held-out", type=int, default=10, help="photos to measure on")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--out", type=Path, default=Path("tuned"))
    options = parser.parse_args(arguments)

    sam = Sam.from_pretrained(options.weights, implementation="xla")  # kernels have no gradient
    sources = find(options.photos, masks=options.masks)[: options.count]
    pairs = folder_pairs(options.photos, options.masks)[options.count :][: options.held_out]
    held_out = [read_photo(pair) for pair in pairs]
    if not held_out:
        parser.error(f"PHOTOS must be more than the {options.count} that are tuned on")
    size = sam.config.image_encoder.image_size
    settings = Settings(
        stages=(Stage(image_size=size, batch=1),),
        steps=options.steps,
        targets=2,
        train=("decoder",),
        objective=Objective(prompting=Prompting(rounds=1), losses=Losses(alpha=0.5)),
        optimiser=Optimiser(learning_rate=options.learning_rate, warmup=10, ema=0.9),
    )
    before = validate(sam, held_out)
    tuned = tune(sam, load(sources, 512), settings, options.out, report=print)
    after = validate(tuned, held_out)
    for name, score in before.items():
        print(f"{name}: {score:.4f} before, {after[name]:.4f} after")
    print(f"wrote {options.out / MODEL}")
    return before["box"], after["box"]


if __name__ == "__main__":
    main()
