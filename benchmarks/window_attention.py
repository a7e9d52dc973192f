"""Correctness, then speed, of the window attention kernel on this machine's GPU.

    python -m benchmarks.window_attention [--out results.jsonl] [--configs] [--only 0 1 ...]

Random normal inputs, fresh every run. Each case is first compared, on the last image's first and
last head, with a float32 reference of the same rounded inputs; times are medians over groups of
launches, with whatever the kernel's caller does in XLA (padding rel, masking the bar). TFLOP/s
count 4 D times the (query, key) pairs of real queries and all keys of their window, without the
products of the bias; GB/s count every input and output once.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import reference
from pallas_kernels.block_layout import BlockLayout
from pallas_kernels.window_attention import mosaic_window_attention
from pallas_kernels.window_kernel import CONFIGS, Config


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One shape of the benchmark; `order` is static, window or head (per window and head)."""

    batch: int = 8
    side: int = 64
    num_heads: int = 16
    head_dim: int = 64
    window_size: int = 14
    density: float = 1.0
    order: str = "static"
    dtype: str = "bfloat16"
    rel_dtype: str = "bfloat16"
    rel_columns: int = 14
    bias: float = 1.0

    @property
    def layout(self) -> BlockLayout:
        """The case's block layout."""
        return BlockLayout.bar(self.window_size**2, self.density)

    @property
    def windows(self) -> int:
        """Windows of an image."""
        return (-(-self.side // self.window_size)) ** 2


CASES = [
    Case(),
    Case(rel_columns=16),
    Case(rel_dtype="float32"),
    Case(dtype="float16", rel_dtype="float16"),
    Case(head_dim=80),
    Case(head_dim=80, rel_columns=16),
    Case(density=0.3),
    Case(density=0.3, rel_columns=16, order="head"),
    Case(batch=1),
    Case(batch=1, rel_columns=16),
    Case(batch=1, side=128),
]


def inputs(case: Case, seed: int) -> tuple[jax.Array, ...]:
    """q, k, v, rel_h, rel_w and, unless it is static, the order."""
    keys = jax.random.split(jax.random.key(seed), 6)
    shape = (case.batch, case.side, case.side, case.num_heads, case.head_dim)
    q, k, v = (jax.random.normal(key, shape, case.dtype) for key in keys[:3])
    rel = [
        (jax.random.normal(key, (*shape[:4], case.window_size)) * case.bias).astype(case.rel_dtype)
        for key in keys[3:5]
    ]
    if case.rel_columns > case.window_size:
        unused = (0, case.rel_columns - case.window_size)
        rel = [jnp.pad(x, ((0, 0),) * 4 + (unused,)) for x in rel]
    if case.order == "static":
        return (q, k, v, *rel)
    lead = (case.batch, case.windows, case.num_heads)[: 3 if case.order == "head" else 2]
    draws = jax.random.uniform(keys[5], (*lead, case.window_size**2))
    return (q, k, v, *rel, jnp.argsort(draws, axis=-1).astype(jnp.int32))


def order_of(case: Case, arrays: tuple[jax.Array, ...]) -> Any:
    """The order that `arrays` hold, or the static one."""
    if case.order != "static":
        return arrays[5]
    return np.random.default_rng(0).permutation(case.window_size**2).astype(np.int32)


def compile_case(case: Case, config: Config | None, arrays: tuple[jax.Array, ...]) -> Any:
    """The kernel as a compiled function of all arrays."""

    def run(*arrays: jax.Array) -> jax.Array:
        return mosaic_window_attention(
            *arrays[:5],
            window_size=case.window_size,
            layout=case.layout,
            order=order_of(case, arrays),
            config=config,
        )

    return jax.jit(run).lower(*arrays).compile()


def relative_error(case: Case, out: jax.Array, arrays: tuple[jax.Array, ...]) -> float:
    """Frobenius error of the last image's first and last head against float32."""
    heads = jnp.array([0, case.num_heads - 1])
    pick = [x[-1:, :, :, heads].astype(jnp.float32) for x in arrays[:5]]
    pick[3:] = [x[..., : case.window_size] for x in pick[3:]]
    order = order_of(case, arrays)
    if case.order != "static":
        order = order[-1:, :, heads] if case.order == "head" else order[-1:]
    want = jax.jit(
        lambda *x: reference.window_attention(
            *x, window_size=case.window_size, layout=case.layout, order=order
        )
    )(*pick)
    got = out[-1:, :, :, heads].astype(jnp.float32)
    return float(jnp.linalg.norm(got - want) / jnp.linalg.norm(want))


def median_seconds(run: Any, groups: int = 9, launches: int = 20) -> tuple[float, float]:
    """Median and spread (max - min) of the time of one launch over groups of launches."""
    jax.block_until_ready(run())
    times = []
    for _ in range(groups):
        start = time.perf_counter()
        jax.block_until_ready([run() for _ in range(launches)][-1])
        times.append((time.perf_counter() - start) / launches)
    return statistics.median(times), max(times) - min(times)


def measure(case: Case, config: Config | None) -> dict[str, Any]:
    """Error and speed of one case."""
    arrays = inputs(case, seed=time.time_ns() % 2**31)
    compiled = compile_case(case, config, arrays)
    out = compiled(*arrays)
    error = relative_error(case, out, arrays)
    seconds, spread = median_seconds(lambda: compiled(*arrays))
    pairs = case.batch * case.num_heads * case.side**2 * case.layout.bar_len
    moved = sum(x.nbytes for x in (*arrays, out))
    return dict(
        error=error,
        ms=seconds * 1e3,
        spread_ms=spread * 1e3,
        tflops=4 * case.head_dim * pairs / seconds / 1e12,
        gb_per_s=moved / seconds / 1e9,
    )


def main() -> None:
    """Check, time and print every case; append JSON lines to `--out`."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--out", help="file for JSON lines")
    parser.add_argument("--configs", action="store_true", help="every configuration that fits")
    parser.add_argument("--only", type=int, nargs="*", help="indices of cases")
    options = parser.parse_args()
    cases = CASES if options.only is None else [CASES[i] for i in options.only]
    device = jax.devices()[0].device_kind
    print(f"{device}, jax {jax.__version__}")
    alone = [dataclasses.replace(config, take_turns=False) for config in CONFIGS]
    for case in cases:
        for config in [*CONFIGS, *alone] if options.configs else [None]:
            record = dict(device=device, jax=jax.__version__, **dataclasses.asdict(case))
            if config is not None:
                record |= dataclasses.asdict(config)
            try:
                record |= measure(case, config)
            except Exception as error:  # a configuration may not fit: the table says so
                print(case, config, "failed:", str(error)[:300], flush=True)
                continue
            changed = [
                f"{field.name}={value}"
                for x in (case, config)
                if x is not None
                for field in dataclasses.fields(x)
                if (value := getattr(x, field.name)) != field.default
            ]
            print(
                f"{' '.join(changed) or 'default'}: {record['ms']:.4f} ms "
                f"+- {record['spread_ms']:.4f}, {record['tflops']:.0f} TFLOP/s, "
                f"{record['gb_per_s']:.0f} GB/s, error {record['error']:.2e}",
                flush=True,
            )
            if options.out:
                with open(options.out, "a", encoding="utf-8") as file:
                    file.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
