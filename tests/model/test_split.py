"""How a density's work is split between attention and MLP."""

import dataclasses
import itertools

import pytest

from sparsesam_jax import PRESETS, Sparsity
from sparsesam_jax.sparsity.split import block_densities, is_routed
from sparsesam_jax.sparsity.work import encoder_work

DENSITIES = (0.25, 0.3, 0.4, 0.5, 0.7, 0.9)


@pytest.mark.parametrize("model", PRESETS)
@pytest.mark.parametrize("density", DENSITIES)
def test_balanced_computes_as_much_as_equal(model: str, density: float):
    config = PRESETS[model].image_encoder
    balanced = encoder_work(config, Sparsity(density)).total
    equal = encoder_work(config, Sparsity(density, split="equal")).total
    assert equal == encoder_work(config, Sparsity.released(density)).total
    assert balanced <= 1.001 * equal  # the MLP's tokens are rounded
    assert balanced >= 0.985 * equal  # global attention has whole blocks


@pytest.mark.parametrize("model", PRESETS)
def test_balanced_keeps_windows_and_thins_out_global_attention(model: str):
    config = PRESETS[model].image_encoder
    for index, (attention, mlp) in enumerate(block_densities(config, Sparsity(0.4))):
        if config.is_global(index):
            assert attention == pytest.approx(0.4**1.5)
        else:
            assert attention == 1
        assert 0.39 <= mlp < 1


def test_what_the_mlp_cannot_use_goes_back_to_global_attention():
    config = PRESETS["vit_t"].image_encoder  # whose work is mostly attention
    attention, mlp = block_densities(config, Sparsity(0.7))[config.global_attn_indexes[0]]
    assert mlp == 1
    assert 0.7**1.5 < attention < 0.7


def test_more_density_is_never_less_of_anything():
    for config in (preset.image_encoder for preset in PRESETS.values()):
        found = [block_densities(config, Sparsity(r / 20)) for r in range(2, 21)]
        for lower, higher in itertools.pairwise(found):
            for one, other in zip(lower, higher, strict=True):
                assert one[0] <= other[0] + 1e-9 and one[1] <= other[1] + 1e-9


@pytest.mark.parametrize(
    "sparsity",
    [
        Sparsity(0.4, split="equal"),
        Sparsity(tuple([0.4] * 12)),
        Sparsity(0.4, attention_density=0.4),
        Sparsity(0.4, mlp_density=0.4),
        Sparsity.released(0.4),
    ],
)
def test_what_is_said_outright_is_not_split(sparsity: Sparsity):
    assert set(block_densities(PRESETS["vit_t"].image_encoder, sparsity)) == {(0.4, 0.4)}


def test_without_an_mlp_to_route_nothing_is_split():
    config = dataclasses.replace(PRESETS["vit_t"].image_encoder, global_attn_indexes=())
    sparsity = Sparsity(0.4)
    assert not any(is_routed(config, sparsity, index) for index in range(config.depth))
    assert set(block_densities(config, sparsity)) == {(0.4, 0.4)}


def test_all_of_it_is_dense():
    config = PRESETS["vit_t"].image_encoder
    assert set(block_densities(config, Sparsity(1.0))) == {(1.0, 1.0)}
