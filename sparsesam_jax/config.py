"""Frozen configurations: the model (`SamConfig`) and its sparsity (`Sparsity`)."""

from __future__ import annotations

import dataclasses
import functools
import json
from typing import Any, Protocol, runtime_checkable

from sparsesam_jax.choices import (
    Curve,
    Features,
    Importance,
    Layout,
    Ranking,
    Split,
    check_choice,
)

Grid = tuple[int, int]  # rows and columns of tokens


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockConfig:
    """What a transformer block is: all that plan, kernels and counting need to know of it.

    Attributes:
        embed_dim: Width d of a token.
        num_heads: Attention heads h.
        mlp_dim: Width of the MLP's hidden layer.
        window_size: Side of an attention window in tokens; None attends over the whole grid.
        rel_pos_size: Side of the window or grid that the tables of relative positions were trained
            for; None has no position bias.
        routable: Whether the MLP may skip tokens once they are ranked.
    """

    embed_dim: int
    num_heads: int
    mlp_dim: int
    window_size: int | None
    rel_pos_size: int | None
    routable: bool

    @property
    def head_dim(self) -> int:
        """Width D of one attention head."""
        return self.embed_dim // self.num_heads

    @property
    def is_global(self) -> bool:
        """Whether the block attends over the whole grid."""
        return self.window_size is None


@runtime_checkable
class EncoderConfig(Protocol):
    """What a sparsity can be applied to: an encoder that describes its blocks."""

    @property
    def blocks(self) -> tuple[BlockConfig, ...]:
        """The transformer blocks, first to last."""
        ...

    @property
    def grid_size(self) -> int:
        """Side of the token grid at the trained image size."""
        ...

    def other_work(self, tokens: int) -> int:
        """Multiply-accumulates outside of the blocks on so many tokens."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageEncoderConfig:
    """Shape of SAM's image encoder, a plain ViT with windowed and global attention blocks.

    Attributes:
        embed_dim: Width d of a token.
        depth: Number of blocks.
        num_heads: Attention heads h; `head_dim` = d / h.
        global_attn_indexes: Blocks that attend over the whole grid; the others attend in windows.
        image_size: Side of the square input in pixels that the position tables were trained for.
        patch_size: Side of a patch in pixels.
        window_size: Side of an attention window in tokens.
        mlp_ratio: Width of the MLP's hidden layer over d.
        out_chans: Channels of the features that the neck returns.
    """

    embed_dim: int
    depth: int
    num_heads: int
    global_attn_indexes: tuple[int, ...]
    image_size: int = 1024
    patch_size: int = 16
    window_size: int = 14
    mlp_ratio: float = 4.0
    out_chans: int = 256

    def __post_init__(self) -> None:
        object.__setattr__(self, "global_attn_indexes", tuple(self.global_attn_indexes))
        sizes = (
            "embed_dim",
            "depth",
            "num_heads",
            "image_size",
            "patch_size",
            "window_size",
            "out_chans",
        )
        for name in sizes:
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be a positive integer, got {value!r}")
        if not self.mlp_ratio > 0:
            raise ValueError(f"mlp_ratio must be positive, got {self.mlp_ratio!r}")
        if self.embed_dim % self.num_heads:
            raise ValueError(
                "embed_dim must be divisible by num_heads, "
                f"got {self.embed_dim} and {self.num_heads}"
            )
        if self.image_size % self.patch_size:
            raise ValueError(
                "image_size must be divisible by patch_size, "
                f"got {self.image_size} and {self.patch_size}"
            )
        for index in self.global_attn_indexes:
            if not isinstance(index, int) or not 0 <= index < self.depth:
                raise ValueError(
                    f"global_attn_indexes must lie in [0, {self.depth}), got {index!r}"
                )

    @property
    def head_dim(self) -> int:
        """Width D of one attention head."""
        return self.embed_dim // self.num_heads

    @property
    def grid_size(self) -> int:
        """Side of the token grid at `image_size`."""
        return self.image_size // self.patch_size

    @property
    def mlp_dim(self) -> int:
        """Width of the MLP's hidden layer."""
        return int(self.embed_dim * self.mlp_ratio)

    def is_global(self, block: int) -> bool:
        """Whether the block attends over the whole grid."""
        return block in self.global_attn_indexes

    @property
    def blocks(self) -> tuple[BlockConfig, ...]:
        """The transformer blocks, first to last.

        An MLP may skip tokens in windowed blocks, or in every block of an encoder without windows.
        """
        return _blocks(self)

    def other_work(self, tokens: int) -> int:
        """Multiply-accumulates of patch embedding and neck."""
        pixels, out = 3 * self.patch_size**2, self.out_chans
        return tokens * (pixels * self.embed_dim + self.embed_dim * out + 9 * out * out)


@functools.lru_cache(maxsize=64)
def _blocks(config: ImageEncoderConfig) -> tuple[BlockConfig, ...]:
    windows = [
        None if config.is_global(index) else config.window_size for index in range(config.depth)
    ]
    return tuple(
        BlockConfig(
            embed_dim=config.embed_dim,
            num_heads=config.num_heads,
            mlp_dim=config.mlp_dim,
            window_size=window,
            rel_pos_size=window or config.grid_size,
            routable=window is not None or not any(windows),
        )
        for window in windows
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamConfig:
    """Shape of a whole SAM: image encoder, prompt encoder and mask decoder.

    The decoder's width is the encoder's `out_chans`. `hq` adds the modules of SAM-HQ.

    Attributes:
        image_encoder: Shape of the image encoder.
        mask_in_chans: Hidden channels of the mask prompt's embedding.
        num_multimask_outputs: Masks that the decoder proposes beside the single-mask output.
        decoder_depth: Layers of the two-way transformer.
        decoder_num_heads: Its attention heads.
        decoder_mlp_dim: Its MLP's hidden width.
        iou_head_depth: Layers of the mask-quality head.
        iou_head_hidden_dim: Its hidden width.
        hq: Whether the mask decoder has SAM-HQ's high-quality token and its convolutions.
    """

    image_encoder: ImageEncoderConfig
    mask_in_chans: int = 16
    num_multimask_outputs: int = 3
    decoder_depth: int = 2
    decoder_num_heads: int = 8
    decoder_mlp_dim: int = 2048
    iou_head_depth: int = 3
    iou_head_hidden_dim: int = 256
    hq: bool = False

    def masks_per_prompt(self, multimask_output: bool) -> int:
        """Masks K of a prompt: the proposals or one; SAM-HQ has one either way."""
        return self.num_multimask_outputs if multimask_output and not self.hq else 1

    def to_json(self) -> str:
        """The configuration as JSON text, as a weights file carries it."""
        return json.dumps(dataclasses.asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> SamConfig:
        """The configuration that `to_json` wrote.

        Raises:
            ValueError: The text is no JSON object with exactly a configuration's fields.
        """
        try:
            fields: dict[str, Any] = json.loads(text)
            encoder = fields.pop("image_encoder")
            encoder["global_attn_indexes"] = tuple(encoder["global_attn_indexes"])
            return cls(image_encoder=ImageEncoderConfig(**encoder), **fields)
        except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
            raise ValueError(f"config must be the JSON of a SamConfig, got {text!r}") from error


def _preset(**encoder: Any) -> SamConfig:
    return SamConfig(image_encoder=ImageEncoderConfig(**encoder))


PRESETS: dict[str, SamConfig] = {
    "vit_t": _preset(embed_dim=192, depth=12, num_heads=3, global_attn_indexes=(2, 5, 8, 11)),
    "vit_b": _preset(embed_dim=768, depth=12, num_heads=12, global_attn_indexes=(2, 5, 8, 11)),
    "vit_l": _preset(embed_dim=1024, depth=24, num_heads=16, global_attn_indexes=(5, 11, 17, 23)),
    "vit_h": _preset(embed_dim=1280, depth=32, num_heads=16, global_attn_indexes=(7, 15, 23, 31)),
}


def _check_density(name: str, value: float | tuple[float, ...]) -> None:
    for density in value if isinstance(value, tuple) else (value,):
        if isinstance(density, bool) or not isinstance(density, int | float):
            raise ValueError(f"{name} must be a number in (0, 1], got {density!r}")
        if not 0 < density <= 1:
            raise ValueError(f"{name} must lie in (0, 1], got {density}")


@dataclasses.dataclass(frozen=True)
class Sparsity:
    """How much of the encoder's work is kept, and which part of it.

    Density r in (0, 1] is the share of work that is kept; r = 1 is the dense encoder. The other
    fields say which keys and tokens the kept work falls on.

    Attributes:
        density: How much attention and MLP compute: one number, or one number a block.
        split: What one number means. `equal` is density r in the attention and the MLP of every
            block. `balanced` computes as much in all, but keeps windows dense, thins out global
            attention and gives the rest to the MLP, see `sparsesam_jax.sparsity.split`.
        attention_density: Density of Stripe-Sort attention; None takes `density`. With this field
            or the next there is nothing to balance.
        mlp_density: Density of the routed MLP; None takes `density`.
        curve: Space-filling curve that cuts the grid into groups of 4 consecutive tokens.
        layout: `interleave` lays the tokens out in stripes (member 0 of every group first, then
            member 1, ...), `contiguous` keeps each group together.
        ranking: What is sorted by importance before attention: whole groups (`group`), whole key
            blocks of the unranked sequence (`block`), or nothing: the bar's blocks are spread over
            the image (`spread`) or are the first of the curve (`none`). The routed MLP always ranks
            groups.
        importance: Score that ranks a group: `sobel` (paper, Eq. 1), `dispersion` (the authors'
            released code), or the controls `uniform` and `random`.
        features: What the score looks at: the attention's `keys` or the block's `input`.
        per_head: Whether every attention head ranks for itself; needs `features="keys"` and no
            block ranking. Heads that share rank their concatenated keys.
        mlp_start: First block whose MLP may be routed; None is the block after the first global
            one. Blocks with global attention always run their MLP on all tokens.
        block_size: Queries and keys in a block of the attention layout.
        seed: Seed of the `random` curve and of the `random` importance.
    """

    density: float | tuple[float, ...]
    _: dataclasses.KW_ONLY
    split: Split = "balanced"
    attention_density: float | tuple[float, ...] | None = None
    mlp_density: float | tuple[float, ...] | None = None
    curve: Curve = "morton"
    layout: Layout = "interleave"
    ranking: Ranking = "group"
    importance: Importance = "sobel"
    features: Features = "keys"
    per_head: bool = False
    mlp_start: int | None = None
    block_size: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("density", "attention_density", "mlp_density"):
            value = getattr(self, name)
            if isinstance(value, list):
                value = tuple(value)
                object.__setattr__(self, name, value)
            if value is not None:
                _check_density(name, value)
        check_choice("split", self.split, Split)
        check_choice("curve", self.curve, Curve)
        check_choice("layout", self.layout, Layout)
        check_choice("ranking", self.ranking, Ranking)
        check_choice("importance", self.importance, Importance)
        check_choice("features", self.features, Features)
        if self.per_head and (self.features != "keys" or self.ranking == "block"):
            raise ValueError(
                "per_head needs features='keys' and a ranking of groups, "
                f"got features={self.features!r} and ranking={self.ranking!r}"
            )
        if self.mlp_start is not None and self.mlp_start < 0:
            raise ValueError(f"mlp_start must be a block number or None, got {self.mlp_start}")
        if self.block_size < 1:
            raise ValueError(f"block_size must be positive, got {self.block_size}")

    @classmethod
    def released(cls, density: float | tuple[float, ...]) -> Sparsity:
        """The method as the authors' released code has it: dispersion of the keys, per head."""
        return cls(
            density,
            split="equal",
            curve="morton",
            layout="interleave",
            ranking="group",
            importance="dispersion",
            features="keys",
            per_head=True,
        )

    def block_density(self, block: int, depth: int) -> tuple[float, float]:
        """The densities that the fields give to one block's attention and MLP, before any split.

        Raises:
            ValueError: A density is given per block, but not for `depth` blocks.
        """
        return (
            self._at("attention_density", block, depth),
            self._at("mlp_density", block, depth),
        )

    def _at(self, name: str, block: int, depth: int) -> float:
        value = getattr(self, name)
        if value is None:
            name, value = "density", self.density
        if not isinstance(value, tuple):
            return value
        if len(value) != depth:
            raise ValueError(f"{name} must have one value a block ({depth}), got {len(value)}")
        return value[block]
