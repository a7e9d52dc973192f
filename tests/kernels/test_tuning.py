"""Which tilings the kernels take: those that were measured, for every preset."""

from __future__ import annotations

import jax.numpy as jnp
import pytest

from pallas_kernels import float8, relative_position, stripe_operands, window_attention
from pallas_kernels.tile_position import supports_tiles
from pallas_kernels.tuning import H200, fitting_matmul, padded
from sparsesam_jax.config import PRESETS

# Which of H200's tilings attention takes: of tiles, of sequences and of windows.
ATTENTION = {"vit_t": (0, 0, 0), "vit_b": (0, 0, 0), "vit_l": (0, 0, 0), "vit_h": (1, 0, 1)}
# Side, width, chunks and stages of the position bias, of windows and of the whole map.
POSITION = {
    "vit_t": ((8, 16, 2, 4), (8, 32, 1, 4)),
    "vit_b": ((4, 16, 2, 4), (4, 64, 1, 4)),
    "vit_l": ((4, 16, 2, 4), (4, 64, 1, 4)),
    "vit_h": ((4, 16, 2, 4), (4, 32, 1, 2)),
}
# Which of a table's tilings QKV, output projection, lin1 and lin2 take; 192 has no tile of 256.
PRODUCTS = {192: (3, 3, 0, 3)}


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("preset", PRESETS)
def test_attention(preset, dtype):
    encoder = PRESETS[preset].image_encoder
    grid, head_dim = (encoder.grid_size,) * 2, encoder.head_dim
    tiles, sequences, windows = ATTENTION[preset]
    fitting = stripe_operands.fitting_config
    assert fitting(grid, head_dim, dtype, tiles=True) == H200.tiles[tiles]
    assert fitting(grid, head_dim, dtype, tiles=False) == H200.sequences[sequences]
    # A sequence without a bias is read as tiles are, which need the least without it.
    for is_tiles in (True, False):
        own = fitting(grid, head_dim, dtype, tiles=is_tiles, has_bias=False)
        assert own == H200.tiles[tiles]
    config = window_attention.fitting_config(encoder.window_size, head_dim, dtype)
    assert config == H200.windows[windows]


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("preset", PRESETS)
def test_position_bias(preset, dtype):
    encoder = PRESETS[preset].image_encoder
    side, heads, head_dim = encoder.grid_size, encoder.num_heads, encoder.head_dim
    for num_keys, config in zip((16, side), POSITION[preset], strict=True):
        keys = (num_keys, num_keys)
        assert relative_position.fitting_config(heads, head_dim, keys, dtype) == config
    assert supports_tiles((side, side), head_dim, dtype)


@pytest.mark.parametrize("rows", [1229, 4096, 9832, 32768])
@pytest.mark.parametrize("preset", PRESETS)
def test_products(preset, rows):
    d, m = PRESETS[preset].image_encoder.embed_dim, padded(rows)
    products = (("bias", 3 * d, d), ("add", d, d), ("gelu", 4 * d, d), ("add", d, 4 * d))
    numbers = list(PRODUCTS.get(d, (0, 0, 0, 0)))
    if d == 192 and m == 9984:
        numbers[0] = 2  # the table has one tiling less there
    for (epilogue, n, k), number in zip(products, numbers, strict=True):
        table = H200.to_residual if epilogue == "add" else H200.to_output
        configs = next(configs for most, configs in table.items() if m <= most)
        for dtype in (jnp.bfloat16, jnp.float16):
            assert fitting_matmul(epilogue, m, n, k, dtype) == configs[number]


@pytest.mark.parametrize("rows", [1229, 32768])
@pytest.mark.parametrize("preset", PRESETS)
def test_float8_products(preset, rows):
    d = PRESETS[preset].image_encoder.embed_dim
    shallow, deep = H200.float8.values()
    products = (("bias", 3 * d, d), ("add", d, d), ("gelu", 4 * d, d), ("add", d, 4 * d))
    for epilogue, n, k in products:
        configs = deep if k > 2048 else shallow
        number = {(192, 192): 3, (192, 768): 2}.get((d, k), 0)  # 192 is no multiple of 128
        assert fitting_matmul(epilogue, padded(rows), n, k, float8.DTYPE) == configs[number]


@pytest.mark.parametrize("head_dim", window_attention.HEAD_DIMS)
@pytest.mark.parametrize("window_size", window_attention.WINDOW_SIZES)
def test_every_window_has_a_tiling(window_size, head_dim):
    assert window_attention.fitting_config(window_size, head_dim, jnp.bfloat16) is not None
