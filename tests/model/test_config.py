"""Configurations: what they accept, what they say otherwise, and their JSON."""

import dataclasses

import pytest

from sparsesam_jax import PRESETS, ImageEncoderConfig, SamConfig, Sparsity


@pytest.mark.parametrize("name", PRESETS)
def test_json_round_trip(name: str):
    config = PRESETS[name]
    assert SamConfig.from_json(config.to_json()) == config
    assert hash(SamConfig.from_json(config.to_json())) == hash(config)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"image_encoder": {}}', '{"colour": 1}'])
def test_json_that_is_no_configuration(text: str):
    with pytest.raises(ValueError, match="config must be the JSON of a SamConfig"):
        SamConfig.from_json(text)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"embed_dim": 100}, "divisible by num_heads"),
        ({"depth": 0}, "depth must be a positive integer"),
        ({"image_size": 1000}, "divisible by patch_size"),
        ({"global_attn_indexes": (12,)}, "global_attn_indexes must lie in"),
        ({"mlp_ratio": 0.0}, "mlp_ratio must be positive"),
    ],
)
def test_encoder_errors(change: dict, message: str):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(PRESETS["vit_t"].image_encoder, **change)


def test_presets_are_the_published_sizes():
    sizes = {
        name: (c.image_encoder.embed_dim, c.image_encoder.depth, c.image_encoder.head_dim)
        for name, c in PRESETS.items()
    }
    assert sizes == {
        "vit_t": (192, 12, 64),
        "vit_b": (768, 12, 64),
        "vit_l": (1024, 24, 64),
        "vit_h": (1280, 32, 80),
    }
    assert isinstance(PRESETS["vit_h"].image_encoder, ImageEncoderConfig)


@pytest.mark.parametrize("density", [0, -0.5, 1.5, float("nan"), (0.5, 0.0)])
def test_density_out_of_range(density):
    with pytest.raises(ValueError, match=r"density must lie in \(0, 1\]"):
        Sparsity(density)
    with pytest.raises(ValueError, match=r"mlp_density must lie in \(0, 1\]"):
        Sparsity(0.5, mlp_density=density)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "fair"}, "split must be one of balanced, equal"),
        ({"curve": "peano"}, "curve must be one of morton, hilbert, raster, random"),
        ({"layout": "striped"}, "layout must be one of interleave, contiguous"),
        ({"ranking": "token"}, "ranking must be one of group, block, spread, none"),
        ({"importance": "entropy"}, "importance must be one of sobel"),
        ({"features": "values"}, "features must be one of keys, input"),
        ({"per_head": True, "features": "input"}, "per_head needs features='keys'"),
        ({"per_head": True, "ranking": "block"}, "per_head needs features='keys'"),
        ({"mlp_start": -1}, "mlp_start must be"),
        ({"block_size": 0}, "block_size must be positive"),
    ],
)
def test_sparsity_errors(options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        Sparsity(0.5, **options)


def test_densities_by_block():
    sparsity = Sparsity((0.1, 0.2, 0.3), mlp_density=0.5)
    assert sparsity.block_density(1, depth=3) == (0.2, 0.5)
    assert Sparsity([0.1, 0.2]).density == (0.1, 0.2)
    assert Sparsity(density=0.4) == Sparsity(0.4)
    with pytest.raises(ValueError, match="density must have one value a block"):
        sparsity.block_density(1, depth=4)
