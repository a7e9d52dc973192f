"""SparseSAM: the sparsity that the encoder itself has, as a method among its rivals.

Its blocks run as in any sparse model, by the kernels where these run.
"""

from __future__ import annotations

import dataclasses

from sparsesam_jax.checkpoints.pretrained import Sam
from sparsesam_jax.config import ImageEncoderConfig, Sparsity
from sparsesam_jax.methods.base import Method
from sparsesam_jax.sparsity.work import EncoderWork, encoder_work


@dataclasses.dataclass(frozen=True)
class SparseSam(Method):
    """The encoder's own sparsity.

    Attributes:
        sparsity: What is kept.
    """

    sparsity: Sparsity

    def apply(self, sam: Sam) -> Sam:
        """The model with this sparsity."""
        return sam.with_sparsity(self.sparsity)

    def work(self, config: ImageEncoderConfig) -> EncoderWork:
        """What the encoder computes with it."""
        return encoder_work(config, self.sparsity)

    def as_sparsity(self) -> Sparsity:
        """The sparsity itself."""
        return self.sparsity


def sparsesam(density: float) -> SparseSam:
    """The default sparsity."""
    return SparseSam(Sparsity(density))


def released(density: float) -> SparseSam:
    """The sparsity of the authors' released code."""
    return SparseSam(Sparsity.released(density))


def random_routing(density: float) -> SparseSam:
    """The control: tokens are routed at random, and attention ranks nothing."""
    return SparseSam(Sparsity(density, split="equal", importance="random", ranking="none"))
