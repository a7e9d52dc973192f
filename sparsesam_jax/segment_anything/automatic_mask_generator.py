"""Meta's `SamAutomaticMaskGenerator`, see `sparsesam_jax.predict.automatic_masks`."""

from __future__ import annotations

from typing import Any

from sparsesam_jax.predict.automatic_masks import AutomaticMaskGenerator
from sparsesam_jax.segment_anything.predictor import SamPredictor
from sparsesam_jax.segment_anything.sam import Sam


class SamAutomaticMaskGenerator(AutomaticMaskGenerator):
    """Finds masks for a whole photo.

    Args:
        model: What a `sam_model_registry` entry returned.
        args: As for `AutomaticMaskGenerator`, in Meta's order.
        options: As for `AutomaticMaskGenerator`, by Meta's names.
    """

    def __init__(self, model: Sam, *args: Any, **options: Any):
        super().__init__(SamPredictor(model), *args, **options)
