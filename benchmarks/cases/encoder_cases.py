"""The encoders that suites measure: a model at a batch, a sparsity and an image size."""

from __future__ import annotations

import dataclasses
from typing import Any

from benchmarks.cases import shapes
from sparsesam_jax.config import ImageEncoderConfig, Sparsity


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncoderCase:
    """One encoder.

    Attributes:
        model: A name of `shapes.MODELS`.
        batch: Images a run.
        sparsity: None is dense.
        dtype: Of parameters and products.
        image_size: Side of the images; None is the model's.
    """

    model: str
    batch: int = 1
    sparsity: Sparsity | None = None
    dtype: str = "float32"
    image_size: int | None = None

    def __str__(self) -> str:
        part = "attention only" if self.attention_only else None
        size = None if self.image_size is None else str(self.image_size)
        parts = self.model, f"B{self.batch}", size, f"r{self.density}", part, self.dtype
        return " ".join(part for part in parts if part)

    @property
    def reference(self) -> EncoderCase:
        """What its first image is compared with."""
        return dataclasses.replace(self, batch=1, dtype="float32")

    @property
    def config(self) -> ImageEncoderConfig:
        """The encoder's configuration."""
        return shapes.model_config(self.model).image_encoder

    @property
    def density(self) -> float:
        """What is kept; 1 is dense."""
        density = 1.0 if self.sparsity is None else self.sparsity.density
        assert isinstance(density, float | int), "suites give one density for all blocks"
        return density

    @property
    def attention_only(self) -> bool:
        """Whether attention is sparse and the MLP whole."""
        return self.sparsity is not None and self.sparsity.mlp_density is not None

    @property
    def work(self) -> Any:
        """`encoder_work` of one image."""
        from sparsesam_jax.sparsity.work import encoder_work

        side = (self.image_size or self.config.image_size) // self.config.patch_size
        return encoder_work(self.config, self.sparsity, (side, side))

    @property
    def fields(self) -> dict[str, Any]:
        """What a record says of it."""
        return dataclasses.asdict(self) | {
            "density": self.density,
            "image_size": self.image_size or self.config.image_size,
            "gmacs": self.work.total / 1e9,
            "weights": shapes.WEIGHTS_DISTRIBUTION,
            "pixels": shapes.PIXELS_DISTRIBUTION,
        }
