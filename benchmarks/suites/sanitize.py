"""Every kernel once, on shapes that are small enough for NVIDIA's compute-sanitizer.

    compute-sanitizer --tool memcheck python -m benchmarks sanitize
    compute-sanitizer --tool racecheck python -m benchmarks sanitize

Prints the error of each beside XLA; the sanitizer says how many errors or hazards it saw.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.run.pool import relative_error
from pallas_kernels.block_layout import BlockLayout
from pallas_kernels.implementation import device_problem
from pallas_kernels.layer_norm import layer_norm
from pallas_kernels.mlp_weights import MLPWeights
from pallas_kernels.projection import projection
from pallas_kernels.routed_mlp import mlp, routed_mlp
from pallas_kernels.stripe_attention import stripe_attention
from pallas_kernels.window_attention import window_attention
from sparsesam_jax.sparsity.orders import curve_order

MAX_ERROR = 2e-2  # relative, of bfloat16 on both sides
Case = Callable[..., jax.Array]


def cases() -> Iterator[tuple[str, Case]]:
    """Names, and functions of `implementation`."""
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(rng.normal(size=shape) / 2, jnp.bfloat16)

    def bound(function: Callable[..., Any], *arrays: Any, **options: Any) -> Case:
        def case(implementation: str) -> jax.Array:
            traced = [x for x in arrays if isinstance(x, jax.Array)]
            if implementation == "xla":  # under a sanitizer, what XLA tries on a GPU crashes
                traced = jax.device_put(traced, jax.devices("cpu")[0])

            def call(*traced: jax.Array) -> jax.Array:
                rest = iter(traced)
                given = [next(rest) if isinstance(x, jax.Array) else x for x in arrays]
                return function(*given, **options, implementation=implementation)

            return jax.jit(call)(*traced)

        return case

    def qkv(side: int, heads: int) -> list[jax.Array]:
        return [normal(1, side, side, 3, heads, 64), *(normal(side, side, 64) for _ in range(2))]

    for name, side, density, heads in (
        ("tiles", 16, 1.0, 1),
        ("tiles", 32, 0.3, 1),
        ("blocks", 32, 0.3, 1),
        ("groups", 16, 0.5, 4),
        ("groups", 16, 0.5, 3),
        ("dense", 64, 1.0, 1),
    ):
        sequence: Any = curve_order("morton", side, side).reshape(-1, 4).T.reshape(-1)
        layout, order = BlockLayout.a_shape(side**2, density), None
        if name == "blocks":
            order = jnp.asarray(rng.permutation(layout.num_kv_blocks)[None], jnp.int32)
        elif name == "groups":
            sequence = jnp.asarray(rng.permutation(sequence)[None], jnp.int32)
        options = dict(layout=layout, block_order=order)
        label = f"stripe attention {name} {side} x {side}, density {density}, {heads} heads"
        yield label, bound(stripe_attention, *qkv(side, heads), sequence, **options)

    bar = dict(layout=BlockLayout.bar(196, 0.3), order=rng.permutation(196).astype(np.int32))
    for height, width, heads, options in ((24, 32, 4, {}), (24, 24, 3, {}), (24, 24, 2, bar)):
        tables = normal(height, 14, 64), normal(width, 14, 64)
        arrays = normal(1, height, width, 3, heads, 64), *tables
        label = f"window attention {height} x {width}, {heads} heads{', bar' if options else ''}"
        yield label, bound(window_attention, *arrays, window_size=14, **options)

    d = 192
    weights = (normal(d), normal(d), normal(d, 4 * d), normal(4 * d), normal(4 * d, d), normal(d))
    x = normal(2, 250, d)
    stream = x.astype(jnp.float16)  # as an encoder's that computes in bfloat16
    index = np.stack([np.sort(rng.permutation(250)[:77]) for _ in range(2)])
    yield "mlp", bound(lambda x, *w, **kw: mlp(x, MLPWeights(*w), **kw), stream, *weights)
    yield (
        "routed mlp",
        bound(
            lambda x, index, *w, **kw: routed_mlp(x, index, MLPWeights(*w), **kw),
            *(stream, jnp.asarray(index, jnp.int32), *weights),
        ),
    )
    arrays = x, normal(d, d), normal(d)
    yield "projection", bound(projection, *arrays)
    yield (
        "projection with residual",
        bound(lambda x, *a, **kw: projection(x, *a[:2], residual=a[2], **kw), *arrays, stream),
    )
    yield "layer norm", bound(layer_norm, stream, normal(d), normal(d), dtype=jnp.bfloat16)


def run() -> int:
    """Run all; 1 where one is wrong, else 0.

    Raises:
        ValueError: The kernels cannot run here.
    """
    problem = device_problem()
    if problem is not None:
        raise ValueError(problem)
    wrong = False
    for name, case in cases():
        got, want = (np.asarray(case(x), np.float32) for x in ("mosaic_gpu", "xla"))
        error = relative_error(got, want)
        wrong |= not error <= MAX_ERROR
        print(f"{name}: error {error:.1e}", flush=True)
    return int(wrong)
