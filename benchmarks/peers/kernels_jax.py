"""The functions of the kernels suite as this project has them, by XLA or as Mosaic GPU kernels."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.cases.kernel_cases import Case
from benchmarks.peers.encoder_jax import device_name, needs_gpu
from benchmarks.records import Record
from benchmarks.run.process import Program
from benchmarks.run.timing import Spread, queued_ms
from pallas_kernels.implementation import Implementation
from pallas_kernels.mlp_weights import MLPWeights
from pallas_kernels.routed_mlp import mlp, routed_mlp
from pallas_kernels.stripe_attention import stripe_attention
from pallas_kernels.window_attention import window_attention

COPIES = 5  # of a function in one program: XLA makes a CUDA graph of five launches or more


def build(
    case: dict[str, Any],
    implementation: Implementation,
    runs: int,
    loops: int,
    reference: bool = False,
) -> Program:
    """One function; its output is the last image's. A reference is float32, of that image alone."""
    needs_gpu(implementation)
    what = Case(**case)
    function, arrays = bind(what, implementation, what.arrays(), reference=reference)
    out = _last(jax.jit(function)(arrays))
    if reference:
        return Program(out, None, {})
    peak = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    copies = min(loops, COPIES)
    launch = (_mlp_launch if what.op == "mlp" else _launch)(function, arrays, copies)

    def call() -> float:
        return queued_ms(launch, jax.block_until_ready, loops // copies) / copies

    def measure() -> Record:
        for _ in range(2):
            call()
        spread = Spread.of([call() for _ in range(runs)])
        return {**spread._asdict(), "peak_mib": None if peak is None else peak / 2**20}

    return Program(out, measure, {"device": device_name(), "copies": copies})


def _launch(
    function: Callable[[Any], jax.Array], arrays: Any, copies: int
) -> Callable[[], list[jax.Array]]:
    """Every copy has an array of its own, or XLA would run one of them."""
    firsts, rest = [jnp.copy(arrays[0]) for _ in range(copies)], arrays[1:]
    several = jax.jit(lambda firsts, rest: [function((x, *rest)) for x in firsts])
    program = several.lower(firsts, rest).compile()
    return lambda: program(firsts, rest)


def _mlp_launch(
    function: Callable[[Any], jax.Array], arrays: Any, copies: int
) -> Callable[[], jax.Array]:
    """Every run continues with the residual stream of the last one, in place where it can."""
    x, rest = jnp.copy(arrays[0]), arrays[1:]

    @functools.partial(jax.jit, donate_argnums=0)
    def several(x: jax.Array, rest: Any) -> jax.Array:
        for _ in range(copies):
            x = function((x, *rest))
        return x

    program = several.lower(x, rest).compile()

    def launch() -> jax.Array:
        nonlocal x
        x = program(x, rest)
        return x

    return launch


def _last(out: jax.Array) -> np.ndarray:
    return np.asarray(out[-1], np.float32)


def bind(
    case: Case,
    implementation: Implementation,
    host: dict[str, np.ndarray],
    *,
    reference: bool = False,
) -> tuple[Callable[[Any], jax.Array], Any]:
    """The function of a tree of arrays, and the arrays."""
    dtype = jnp.dtype("float32" if reference else case.dtype)

    def put(name: str, *, by_image: bool = False) -> Any:
        x = host[name]
        x = x[-1:] if by_image and reference else x
        return jnp.asarray(x, dtype if x.dtype == np.float32 else None)

    options: dict[str, Any] = {"implementation": implementation}
    if case.op == "mlp":
        weights = MLPWeights(*(put(name) for name in MLPWeights._fields))
        arrays = (put("x", by_image=True), put("index", by_image=True), weights)
        if case.density == 1:
            return lambda a: mlp(a[0], a[2], **options), arrays
        return lambda a: routed_mlp(a[0], a[1], a[2], **options), arrays
    arrays = (put("qkv", by_image=True), put("rel_pos_h"), put("rel_pos_w"))
    options["layout"] = case.layout
    if case.op == "window":
        options["window_size"] = case.window_size
        if case.density == 1:
            return lambda a: window_attention(*a, **options), arrays
        arrays = (*arrays, put("order", by_image=True))
        return lambda a: window_attention(*a[:3], order=a[3], **options), arrays
    if case.density == 1 or case.order == "tiles":
        sequence = host.get("sequence")  # static, so that its blocks are known to be tiles
        return lambda a: stripe_attention(a[0], a[1], a[2], sequence, **options), arrays
    arrays = (*arrays, put("sequence", by_image=True))
    return lambda a: stripe_attention(*a, **options), arrays
