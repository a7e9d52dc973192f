"""Correctness, then speed, of the stripe attention kernel on this machine's GPU.

    python -m benchmarks.stripe_attention [--out results.jsonl] [--configs] [--quick]

Random normal inputs, fresh every run. TFLOP/s count 4 B H D times the (query, key) pairs of the
computed blocks, without the products of the bias. Each case is first compared on two heads with a
float32 reference of the same rounded inputs; times are medians over groups of launches.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import reference
from pallas_kernels.block_layout import BlockLayout
from pallas_kernels.stripe_attention import mosaic_stripe_attention
from pallas_kernels.stripe_kernel import CONFIGS, Config


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One shape of the benchmark; `order` is tiles, blocks (ranked) or groups (ranked)."""

    batch: int = 8
    side: int = 64
    num_heads: int = 16
    head_dim: int = 64
    density: float = 1.0
    order: str = "tiles"
    dtype: str = "bfloat16"
    rel_dtype: str = "bfloat16"
    bias: float = 1.0

    @property
    def layout(self) -> BlockLayout:
        """The case's block layout."""
        return BlockLayout.a_shape(self.side**2, self.density)


CASES = [
    Case(),
    Case(density=0.5),
    Case(density=0.3),
    Case(density=0.25),
    Case(head_dim=80),
    Case(head_dim=80, density=0.3),
    Case(batch=1),
    Case(batch=1, density=0.3),
    Case(density=0.3, order="blocks"),
    Case(order="groups"),
    Case(density=0.3, order="groups"),
    Case(dtype="float16", rel_dtype="float16"),
    Case(rel_dtype="float32"),
    Case(side=128, batch=1),
    Case(side=128, batch=1, density=0.3),
    Case(side=32, batch=8),
]


def stripe_coordinates(side: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns of the Morton stripe sequence, relabelled so that tiles are contiguous."""

    def spread(x: np.ndarray) -> np.ndarray:
        return np.sum([((x >> i) & 1) << (2 * i) for i in range(8)], axis=0)

    rows, cols = np.divmod(np.arange(side**2), side)
    order = np.argsort(2 * spread(rows) + spread(cols)).reshape(-1, 4).T.reshape(-1)
    # Parity-major labels: a stride-2 tile of 8 x 16 tokens has 8 neighbouring rows, 16 columns.
    labels = np.arange(side) % 2 * (side // 2) + np.arange(side) // 2
    return labels[rows[order]].astype(np.int32), labels[cols[order]].astype(np.int32)


def inputs(case: Case, seed: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of `mosaic_stripe_attention`: arrays, then the static ones."""
    keys = jax.random.split(jax.random.key(seed), 6)
    shape = (case.batch, case.side**2, case.num_heads, case.head_dim)
    q, k, v = (jax.random.normal(key, shape, case.dtype) for key in keys[:3])
    rel = [
        (jax.random.normal(key, (*shape[:3], case.side)) * case.bias).astype(case.rel_dtype)
        for key in keys[3:5]
    ]
    rows, cols = stripe_coordinates(case.side)
    block_order = None
    if case.order == "blocks":
        image_keys = jax.random.split(keys[5], case.batch)
        block_order = jnp.stack(
            [jax.random.permutation(key, case.layout.num_kv_blocks) for key in image_keys]
        )
    if case.order == "groups":
        image_keys = jax.random.split(keys[5], case.batch)
        sequence = jnp.stack([jax.random.permutation(key, case.side**2) for key in image_keys])
        rows, cols = jnp.asarray(rows)[sequence], jnp.asarray(cols)[sequence]
    return (q, k, v, *rel), dict(rows=rows, cols=cols, block_order=block_order)


def call(case: Case, config: Config | None, arrays: tuple[Any, ...], keys: dict):
    """The kernel as a compiled function of all arrays, with them bound."""
    static = isinstance(keys["rows"], np.ndarray)

    def run(arrays, block_order, rows, cols):
        rows, cols = (keys["rows"], keys["cols"]) if static else (rows, cols)
        q, k, v, rel_h, rel_w = arrays
        call = functools.partial(mosaic_stripe_attention, layout=case.layout, config=config)
        return call(q, k, v, rel_h, rel_w, rows, cols, block_order=block_order)

    coordinates = (None, None) if static else (keys["rows"], keys["cols"])
    arguments = (arrays, keys["block_order"], *coordinates)
    return jax.jit(run).lower(*arguments).compile(), arguments


def relative_error(case: Case, out: jax.Array, arrays: tuple[Any, ...], keys: dict) -> float:
    """Frobenius error of the last image's first and last head against float32."""
    heads = jnp.array([0, case.num_heads - 1])
    pick = [x[-1:, :, heads].astype(jnp.float32) for x in arrays]
    rows, cols = (x if x.ndim == 1 else x[-1:] for x in (keys["rows"], keys["cols"]))
    order = keys["block_order"]
    attend = functools.partial(
        reference.stripe_attention,
        layout=case.layout,
        block_order=None if order is None else order[-1:],
    )
    want = jax.jit(lambda q, k, v, rel_h, rel_w: attend(q, k, v, rel_h, rel_w, rows, cols))(*pick)
    got = out[-1:, :, heads].astype(jnp.float32)
    return float(jnp.linalg.norm(got - want) / jnp.linalg.norm(want))


def median_seconds(run, groups: int = 9, launches: int = 10) -> tuple[float, float]:
    """Median and spread (max - min) of the time of one launch over groups of launches."""
    out = jax.block_until_ready(run())
    times = []
    for _ in range(groups):
        start = time.perf_counter()
        for _ in range(launches):
            out = run()
        jax.block_until_ready(out)
        times.append((time.perf_counter() - start) / launches)
    return statistics.median(times), max(times) - min(times)


def main() -> None:
    """Check, time and print every case; write JSON lines to `--out`."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--out", help="file for JSON lines")
    parser.add_argument("--configs", action="store_true", help="every tiling that fits")
    parser.add_argument("--only", type=int, nargs="*", help="indices of cases")
    options = parser.parse_args()
    cases = CASES if options.only is None else [CASES[i] for i in options.only]
    device = jax.devices()[0].device_kind
    print(f"{device}, jax {jax.__version__}")
    for case in cases:
        arrays, keys = inputs(case, seed=time.time_ns() % 2**31)
        for config in CONFIGS if options.configs else [None]:
            record: dict[str, Any] = dict(
                device=device, jax=jax.__version__, **dataclasses.asdict(case)
            )
            if config is not None:
                record |= dataclasses.asdict(config)
            try:
                compiled, arguments = call(case, config, arrays, keys)
                out = compiled(*arguments)
                record["error"] = relative_error(case, out, arrays, keys)
                seconds, spread = median_seconds(functools.partial(compiled, *arguments))
            except Exception as error:  # a tiling may not fit: the table says so
                print(case, config, "failed:", str(error)[:300], flush=True)
                continue
            pairs = case.layout.block_mask.sum() * 64 * 64
            flops = 4 * case.batch * case.num_heads * case.head_dim * float(pairs)
            record |= dict(ms=seconds * 1e3, spread_ms=spread * 1e3, tflops=flops / seconds / 1e12)
            text = f"B{case.batch} S{case.side} H{case.num_heads} D{case.head_dim} r{case.density}"
            tiling = "" if config is None else f" {tuple(dataclasses.asdict(config).values())}"
            print(
                f"{text} {case.order} {case.dtype}/{case.rel_dtype}{tiling}: "
                f"{record['ms']:.3f} ms +- {record['spread_ms']:.3f}, "
                f"{record['tflops']:.0f} TFLOP/s, error {record['error']:.2e}",
                flush=True,
            )
            if options.out:
                with open(options.out, "a") as file:
                    file.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
