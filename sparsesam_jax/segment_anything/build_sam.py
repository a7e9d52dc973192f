"""Meta's builders and their registry; checkpoints of every format are taken."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable

import jax.numpy as jnp
from jax.typing import DTypeLike

from pallas_kernels.implementation import Implementation
from sparsesam_jax.checkpoints.pretrained import Sam as CheckpointSam
from sparsesam_jax.choices import Products
from sparsesam_jax.config import PRESETS, Sparsity
from sparsesam_jax.segment_anything.sam import Sam


def build_sam_vit_h(
    checkpoint: str | os.PathLike[str] | None = None,
    *,
    sparsity: Sparsity | None = None,
    dtype: DTypeLike = jnp.float32,
    implementation: Implementation = "auto",
    products: Products = "dtype",
) -> Sam:
    """SAM with the image encoder ViT-H.

    Args:
        checkpoint: Meta's `.pth`, or a checkpoint of another format that `Sam.from_pretrained`
            takes.
        sparsity: What the image encoder keeps; None is dense, SAM exactly.
        dtype: Compute dtype.
        implementation: `"xla"`, `"mosaic_gpu"` or `"auto"`, see `pallas_kernels.implementation`.
        products: What the image encoder's blocks multiply in: `"dtype"` or `"float8"`.

    Raises:
        ValueError: There is no checkpoint, or it is of another model.
    """
    return _build("vit_h", checkpoint, sparsity, dtype, implementation, products)


def build_sam_vit_l(
    checkpoint: str | os.PathLike[str] | None = None,
    *,
    sparsity: Sparsity | None = None,
    dtype: DTypeLike = jnp.float32,
    implementation: Implementation = "auto",
    products: Products = "dtype",
) -> Sam:
    """SAM with the image encoder ViT-L; arguments as `build_sam_vit_h`."""
    return _build("vit_l", checkpoint, sparsity, dtype, implementation, products)


def build_sam_vit_b(
    checkpoint: str | os.PathLike[str] | None = None,
    *,
    sparsity: Sparsity | None = None,
    dtype: DTypeLike = jnp.float32,
    implementation: Implementation = "auto",
    products: Products = "dtype",
) -> Sam:
    """SAM with the image encoder ViT-B; arguments as `build_sam_vit_h`."""
    return _build("vit_b", checkpoint, sparsity, dtype, implementation, products)


def build_sam_vit_t(
    checkpoint: str | os.PathLike[str] | None = None,
    *,
    sparsity: Sparsity | None = None,
    dtype: DTypeLike = jnp.float32,
    implementation: Implementation = "auto",
    products: Products = "dtype",
) -> Sam:
    """This project's small model; arguments as `build_sam_vit_h`, its own weights by default."""
    return _build("vit_t", checkpoint or "vit_t", sparsity, dtype, implementation, products)


build_sam = build_sam_vit_h

sam_model_registry: dict[str, Callable[..., Sam]] = {
    "default": build_sam_vit_h,
    "vit_h": build_sam_vit_h,
    "vit_l": build_sam_vit_l,
    "vit_b": build_sam_vit_b,
    "vit_t": build_sam_vit_t,
}


def _build(
    name: str,
    checkpoint: str | os.PathLike[str] | None,
    sparsity: Sparsity | None,
    dtype: DTypeLike,
    implementation: Implementation,
    products: Products,
) -> Sam:
    if checkpoint is None:
        raise ValueError(f"checkpoint must be given for {name}, got None")
    sam = CheckpointSam.from_pretrained(
        checkpoint,
        sparsity=sparsity,
        dtype=dtype,
        implementation=implementation,
        products=products,
    )
    if dataclasses.replace(sam.config, hq=False) != PRESETS[name]:
        kinds = [kind for kind, config in PRESETS.items() if config == sam.config]
        got = kinds[0] if kinds else f"one of width {sam.config.image_encoder.embed_dim}"
        raise ValueError(f"checkpoint must be of {name}, got {os.fspath(checkpoint)!r}, {got}")
    return Sam(sam)
