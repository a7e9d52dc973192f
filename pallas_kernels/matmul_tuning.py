"""Which tiling of the matrix product kernel a product takes."""

from __future__ import annotations

import math

from pallas_kernels.matmul_kernel import Config

ROW_MULTIPLE = 256  # rows of an operand are padded to this: every tile's rows divide it

# Tilings by the rows of a product, up to which they hold, measured on an NVIDIA H200 in bfloat16 at
# d = 1024 (`python -m benchmarks.routed_mlp`); the first that fits is taken. TFLOP/s, epilogue
# included: 1229, 4096, 9832 and 32768 rows are densities 0.3 and 1 at batch 1 and 8.
_PINGPONG = Config(cluster=2)
_SHARED = Config(tile_n=256, num_slots=1, take_turns=False)
_ANY = (_PINGPONG, Config(), Config(tile_n=64))
TO_OUTPUT: dict[float, tuple[Config, ...]] = {  # bias and GELU
    2048: (Config(tile_m=64, num_stages=6), *_ANY),  # 366
    6144: (_SHARED, *_ANY),  # 540, ping-pong 484
    16384: _ANY,  # 585, shared 540
    math.inf: (Config(cluster=2, group_m=32), *_ANY),  # 625, groups of 16 580, shared 557
}
TO_RESIDUAL: dict[float, tuple[Config, ...]] = {  # bias, residual and scatter
    2048: (Config(), *_ANY),  # 337
    6144: (_SHARED, *_ANY),  # 664, ping-pong 443
    16384: (Config(tile_m=64, tile_n=256, num_stages=5, num_slots=1), *_ANY),  # 607, 128 x 128 593
    math.inf: (_SHARED, *_ANY),  # 676, ping-pong 636
}


def fitting_config(table: dict[float, tuple[Config, ...]], m: int, n: int, k: int) -> Config | None:
    """The first tiling of a table that fits a product of [m, k] and [k, n]."""
    configs = next(configs for rows, configs in table.items() if m <= rows)
    return next((config for config in configs if config.fits(m, n, k)), None)


def padded(num_rows: int) -> int:
    """Rows of the compact buffers for so many tokens."""
    return -(-num_rows // ROW_MULTIPLE) * ROW_MULTIPLE
