"""The model as a JAX function: compiled once, mapped over prompts, exported to a file.

    python examples/jit_vmap_export.py photo.jpg --out sam.jaxexport

The exported file holds the program for any number of prompts, without the parameters.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx

from sparsesam_jax import Sam, Sparsity
from sparsesam_jax.predict.image_files import read_image


def main(arguments: Sequence[str] | None = None) -> dict[str, jax.Array]:
    """Segment a photo at a grid of points in three ways and return the masks of each."""
    parser = argparse.ArgumentParser(description="Compile, map and export a SAM.")
    parser.add_argument("photo", type=Path)
    parser.add_argument("--weights", default="vit_t")
    parser.add_argument("--density", type=float, default=0.4)
    parser.add_argument("--out", type=Path, default=Path("sam.jaxexport"))
    options = parser.parse_args(arguments)

    sam = Sam.from_pretrained(options.weights, sparsity=Sparsity(options.density))
    # Once, not at every call as `nnx.jit` does: a flat list is what JAX hands over fastest.
    graph, state = nnx.split(sam)
    leaves, tree = jax.tree.flatten(state)

    def segment(leaves: list[jax.Array], image: jax.Array, points: jax.Array) -> jax.Array:
        """Foreground logits at points [P, 2] of an image [height, width, 3]: [P, height, width]."""
        model = nnx.merge(graph, jax.tree.unflatten(tree, leaves))
        labels = jnp.ones((1, points.shape[0], 1), jnp.int32)
        prediction = model(
            image[None], points[None, :, None], labels, multimask_output=False, return_logits=True
        )
        return prediction.masks[0, :, 0]

    image = jnp.asarray(read_image(options.photo), jnp.float32)
    height, width = image.shape[:2]
    x, y = jnp.meshgrid(jnp.array([0.25, 0.75]) * width, jnp.array([0.25, 0.75]) * height)
    points = jnp.stack([x.ravel(), y.ravel()], axis=-1)  # 4 points, (x, y)

    # jit: all points are prompts of one call.
    compiled = jax.jit(segment)
    masks = {"jit": compiled(leaves, image, points) > 0}

    # vmap: the same photo darker and brighter, one program for all of them.
    photos = jnp.stack([0.8 * image, image, jnp.clip(1.2 * image, 0, 255)])
    mapped = jax.jit(jax.vmap(segment, in_axes=(None, 0, None)))
    masks["vmap"] = mapped(leaves, photos, points) > 0  # [3, P, height, width]

    # export: the number of points stays open. The file runs without this package.
    count = jax.export.symbolic_shape("points, 2")
    exported = jax.export.export(compiled)(
        [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves],
        jax.ShapeDtypeStruct(image.shape, image.dtype),
        jax.ShapeDtypeStruct(count, points.dtype),
    )
    options.out.write_bytes(exported.serialize())
    restored = jax.export.deserialize(bytearray(options.out.read_bytes()))
    masks["export"] = jax.jit(restored.call)(leaves, image, points[:3]) > 0

    for name, values in masks.items():
        print(f"{name}: {values.shape}, {float(values.mean()):.1%} foreground")
    return masks


if __name__ == "__main__":
    main()
