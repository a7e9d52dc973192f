"""What a method is, and an encoder that runs its blocks by one."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Sequence

from flax import nnx
from jaxtyping import Array, Float

from sparsesam_jax.checkpoints.pretrained import Sam
from sparsesam_jax.config import Grid, ImageEncoderConfig, Sparsity
from sparsesam_jax.model.blocks import AttentionTables
from sparsesam_jax.model.image_encoder import ImageEncoder
from sparsesam_jax.sparsity.work import EncoderWork


class Method(abc.ABC):
    """A training-free change of the image encoder that makes it cheaper."""

    @abc.abstractmethod
    def apply(self, sam: Sam) -> Sam:
        """A dense model with the method, sharing its parameters.

        Raises:
            ValueError: The method does not fit the model.
        """

    @abc.abstractmethod
    def work(self, config: ImageEncoderConfig) -> EncoderWork:
        """Multiply-accumulates of one image, what the method itself adds included."""

    def as_sparsity(self) -> Sparsity | None:
        """The sparsity that the method is, if it is one."""
        return None


@dataclasses.dataclass(frozen=True)
class BlockMethod(Method):
    """A method that applies the encoder's blocks as it likes, in plain JAX.

    Attributes:
        density: Share of the work that is kept, in (0, 1]; each method says which work.
    """

    density: float

    def __post_init__(self) -> None:
        if not 0 < self.density <= 1:
            raise ValueError(f"density must lie in (0, 1], got {self.density}")

    @abc.abstractmethod
    def block_outputs(self, encoder: ImageEncoder, x: Float[Array, "B Gh Gw d"]) -> list[Array]:
        """The tokens after every block, each [B, Gh, Gw, d].

        Args:
            encoder: Whose blocks are applied.
            x: The tokens before the first.
        """

    def apply(self, sam: Sam) -> Sam:
        """The model with its encoder's blocks applied by this method."""
        model = sam.with_sparsity(None)
        model.image_encoder = MethodEncoder(model.image_encoder, self)
        return model


class MethodEncoder(ImageEncoder):
    """An image encoder whose blocks are applied by a method; it shares the other's parameters."""

    def __init__(self, encoder: ImageEncoder, method: BlockMethod):
        nnx.Module.__init__(self)
        self.config = encoder.config
        self.dtypes = encoder.dtypes
        self.implementation = encoder.implementation
        self.remat = encoder.remat
        self.sparsity = None
        self.patch_embed = encoder.patch_embed
        self.pos_embed = encoder.pos_embed
        self.blocks = encoder.blocks
        self.neck = encoder.neck
        self.method = method

    def tables(
        self, grid: Grid | None = None, frame: Grid | None = None
    ) -> tuple[AttentionTables, ...]:
        """None: a method applies the blocks as it likes."""
        return ()

    def block_outputs(
        self,
        pixels: Float[Array, "B height width 3"],
        tables: Sequence[AttentionTables | None] = (),
        frame: Grid | None = None,
    ) -> list[Array]:
        """The tokens after every block, each [B, Gh, Gw, d].

        Raises:
            ValueError: The pixels are a part of a larger frame.
        """
        x = self.embed(pixels)
        if frame not in (None, x.shape[1:3]):
            raise ValueError(f"frame must be the pixels' own for a method, got {frame}")
        return self.method.block_outputs(self, x)
