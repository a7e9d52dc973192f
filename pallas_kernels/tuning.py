"""Which tilings the kernels take, by device and shape; each says what was measured.

Only the NVIDIA H200 has been measured (jax 0.11.2, bfloat16); other devices take its entry. The
tilings of 8-bit products are those of a prototype, which ran on an NVIDIA H100.
Of several tilings the first that fits in registers and shared memory is taken.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from pallas_kernels import float8, matmul_kernel, stripe_schedule, window_kernel

ROW_MULTIPLE = 256  # rows of a product's operand are padded to this: every tile's rows divide it

Matmuls = dict[float, tuple[matmul_kernel.Config, ...]]  # up to which number of rows, or depth


class Tuning(NamedTuple):
    """The tilings of one device.

    Attributes:
        tiles: Stripe attention whose blocks are tiles.
        sequences: Stripe attention of a gathered sequence.
        windows: Window attention.
        to_output: Products with bias, or with bias and GELU, by their rows.
        to_residual: Products with bias, residual and perhaps scatter, by their rows.
        float8: All products of 8-bit operands, by their depth.
    """

    tiles: tuple[stripe_schedule.Config, ...]
    sequences: tuple[stripe_schedule.Config, ...]
    windows: tuple[window_kernel.Config, ...]
    to_output: Matmuls
    to_residual: Matmuls
    float8: Matmuls


_PINGPONG = matmul_kernel.Config(cluster=2)
_SHARED = matmul_kernel.Config(tile_n=256, num_slots=1, take_turns=False)
_ANY = (_PINGPONG, matmul_kernel.Config(), matmul_kernel.Config(tile_n=64))

# Of 8-bit operands: a row of 128 is the TMA's widest swizzle.
_WIDE8 = matmul_kernel.Config(tile_m=64, tile_n=256, tile_k=128)
_SHARED8 = matmul_kernel.Config(tile_n=256, tile_k=128, num_slots=1, take_turns=False)
_ANY8 = (
    matmul_kernel.Config(tile_k=128),
    matmul_kernel.Config(tile_n=64, tile_k=128),
    matmul_kernel.Config(tile_n=64),
)

H200 = Tuning(
    # `python -m benchmarks tune stripe`, TFLOP/s of the kernel alone, B8 N4096 H16: D 64 dense
    # and at density 0.3, or as said.
    tiles=(
        stripe_schedule.Config(num_warpgroups=3, block_kv=128, num_stages=3),  # 414, 348
        # With one stage more 359, 303; D 80 dense: 393.
        stripe_schedule.Config(num_warpgroups=2, block_kv=128, num_stages=2),
        stripe_schedule.Config(num_warpgroups=2, block_kv=64, num_stages=2),
    ),
    # Ranked groups, density 0.3.
    sequences=(
        stripe_schedule.Config(num_warpgroups=3, block_kv=64, num_stages=3),  # 237
        stripe_schedule.Config(num_warpgroups=2, block_kv=64, num_stages=3),  # 185
        stripe_schedule.Config(num_warpgroups=2, block_kv=64, num_stages=2),
    ),
    # `python -m benchmarks tune window`, ms a layer, B8, 64 x 64 tokens, H16, w 14.
    windows=(
        window_kernel.Config(),  # D 64: 0.131 and 0.125 in two runs, without turns 0.135
        window_kernel.Config(q_stages=1),  # D 80: 0.218
        window_kernel.Config(kv_stages=1, q_stages=1),
    ),
    # `python -m benchmarks tune lin1`, TFLOP/s at d = 1024 with bias and GELU; 1229, 4096, 9832
    # and 32768 rows are densities 0.3 and 1 at batch 1 and 8.
    to_output={
        2048: (matmul_kernel.Config(tile_m=64, num_stages=6), *_ANY),  # 366
        6144: (_SHARED, *_ANY),  # 540, ping-pong 484
        16384: _ANY,  # 585, shared 540
        # 625, groups of 16 580, shared 557.
        math.inf: (matmul_kernel.Config(cluster=2, group_m=32), *_ANY),
    },
    # The same with bias, residual and scatter.
    to_residual={
        2048: (matmul_kernel.Config(), *_ANY),  # 337
        6144: (_SHARED, *_ANY),  # 664, ping-pong 443
        # 607, 128 x 128 593.
        16384: (
            matmul_kernel.Config(tile_m=64, tile_n=256, num_stages=5, num_slots=1),
            *_ANY,
        ),
        math.inf: (_SHARED, *_ANY),  # 676, ping-pong 636
    },
    # The prototype (bfloat16 out, no scales) at d = 1024 and 32768 rows on an H100, TFLOP/s.
    float8={
        2048: (_WIDE8, *_ANY8),  # qkv 1185, proj 1066, lin1 with GELU 994
        math.inf: (_SHARED8, *_ANY8),  # lin2 1368
    },
)
BY_DEVICE = {"NVIDIA H200": H200}


def tuned() -> Tuning:
    """The tilings for the default device."""
    return BY_DEVICE.get(jax.devices()[0].device_kind, H200)


def fitting_matmul(
    epilogue: matmul_kernel.Epilogue, m: int, n: int, k: int, dtype: DTypeLike = jnp.bfloat16
) -> matmul_kernel.Config | None:
    """The first tiling that fits a product of [m, k] and [k, n] with this epilogue."""
    if jnp.dtype(dtype) == float8.DTYPE:
        table, size = tuned().float8, k
    else:
        table, size = (tuned().to_residual if epilogue == "add" else tuned().to_output), m
    configs = next(configs for most, configs in table.items() if size <= most)
    return next((config for config in configs if config.fits(m, n, k, dtype)), None)


def padded(num_rows: int) -> int:
    """Rows of the compact buffers for so many tokens."""
    return -(-num_rows // ROW_MULTIPLE) * ROW_MULTIPLE
