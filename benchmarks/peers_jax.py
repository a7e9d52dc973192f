"""This project's encoder as the workers run it."""

from __future__ import annotations

import time

import numpy as np

from benchmarks.worker import Built, Job


def build(job: Job) -> Built:
    """Our image encoder, float32, compiled ahead of its first run."""
    import jax
    from flax import nnx

    from sparsesam_jax import Sam, Sparsity

    sparsity = None if job.density == 1 else Sparsity(job.density)
    implementation = job.implementation
    assert implementation in ("xla", "mosaic_gpu")
    sam = Sam.from_pretrained(job.weights, sparsity=sparsity, implementation=implementation)
    graphdef, state = nnx.split(sam.image_encoder)
    pixels = jax.device_put(np.load(job.pixels))

    @jax.jit
    def encode(state: nnx.State, pixels: jax.Array) -> jax.Array:
        return nnx.merge(graphdef, state)(pixels)

    start = time.perf_counter()
    compiled = encode.lower(state, pixels).compile()
    compile_s = time.perf_counter() - start
    flops = (compiled.cost_analysis() or {}).get("flops")
    return Built(
        call=lambda: jax.block_until_ready(compiled(state, pixels)),
        features=np.asarray,
        compile_s=compile_s,
        notes={
            "attention": "dense" if sparsity is None else "Stripe-Sort, default Sparsity",
            "gflop": None if flops is None else flops / 1e9,
        },
    )
