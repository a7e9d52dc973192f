"""What is measured: methods by name, or a `Sparsity`."""

from __future__ import annotations

from typing import NamedTuple

from sparsesam_jax import methods
from sparsesam_jax.checkpoints.pretrained import Sam
from sparsesam_jax.config import ImageEncoderConfig, Sparsity
from sparsesam_jax.sparsity.work import encoder_work


class Candidate(NamedTuple):
    """What is measured: a method by name at a density, or a `Sparsity` of one's own."""

    method: str
    density: float
    sparsity: Sparsity | None = None

    @property
    def is_dense(self) -> bool:
        """Whether this is the dense encoder, whatever it is called."""
        return self.density == 1 and self.sparsity is None

    def model(self, sam: Sam) -> Sam:
        """The dense model with the method."""
        if self.sparsity is not None:
            return sam.with_sparsity(self.sparsity)
        return sam if self.is_dense else methods.apply(sam, self.method, self.density)

    def gmacs(self, config: ImageEncoderConfig) -> float:
        """Counted work of one image, in 10^9 multiply-accumulates."""
        if self.sparsity is not None or self.is_dense:
            return encoder_work(config, self.sparsity).total / 1e9
        return methods.work(config, self.method, self.density).total / 1e9


DENSE = Candidate("dense", 1.0)
