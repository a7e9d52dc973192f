"""Blocks as they describe themselves: replaced layers, remat, plain ViTs, one trace a kind."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from models import SMALL, random_weights

from pallas_kernels import implementation, reference
from sparsesam_jax import Sam, SamConfig, Sparsity
from sparsesam_jax.config import BlockConfig
from sparsesam_jax.model.blocks import Block, run_block
from sparsesam_jax.model.image_encoder import ImageEncoder
from sparsesam_jax.model.layers import FLOAT32
from sparsesam_jax.sparsity.plan import Rankings, encoder_plan
from sparsesam_jax.sparsity.split import is_routed
from sparsesam_jax.sparsity.work import encoder_work

SPARSITIES = [None, Sparsity(0.4, block_size=16)]
LAYERS = ["attn.qkv", "attn.proj", "mlp.lin1", "mlp.lin2"]


@pytest.fixture
def encoder(tmp_path) -> ImageEncoder:
    return Sam.from_pretrained(random_weights(tmp_path / "sam.safetensors")).image_encoder


def pixels(seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal((2, 128, 128, 3), np.float32))


def lora(layer: nnx.Linear, seed: int = 0) -> nnx.LoRALinear:
    """The layer with a low-rank update that is not zero."""
    new = nnx.LoRALinear(layer.in_features, layer.out_features, lora_rank=2, rngs=nnx.Rngs(seed))
    new.kernel[...], new.bias[...] = layer.kernel[...], layer.bias[...]
    rng = np.random.default_rng(seed)
    for factor in (new.lora.lora_a, new.lora.lora_b):
        factor[...] = jnp.asarray(0.1 * rng.standard_normal(factor.shape, np.float32))
    return new


def replace(block: Block, name: str, layer: Any) -> None:
    part, name = name.split(".")
    setattr(getattr(block, part), name, layer)


def layer_of(block: Block, name: str) -> nnx.Linear:
    part, name = name.split(".")
    return getattr(getattr(block, part), name)


@pytest.mark.parametrize("sparsity", SPARSITIES, ids=["dense", "sparse"])
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_in_the_place_of_another_is_used(encoder: ImageEncoder, name: str, sparsity):
    """LoRA gives what its merged kernel gives, in windowed and in global blocks."""
    encoder.set_sparsity(sparsity)
    updates = []
    for index, block in enumerate(encoder.blocks):
        layer = lora(layer_of(block, name), index)
        updates.append(layer.lora.lora_a[...] @ layer.lora.lora_b[...])
        replace(block, name, layer)
    with_lora = encoder(pixels())
    for block, update in zip(encoder.blocks, updates, strict=True):
        old = layer_of(block, name)
        merged = nnx.Linear(old.in_features, old.out_features, rngs=nnx.Rngs(0))
        merged.kernel[...], merged.bias[...] = old.kernel[...] + update, old.bias[...]
        replace(block, name, merged)
    expected = encoder(pixels())
    for block, update in zip(encoder.blocks, updates, strict=True):
        layer_of(block, name).kernel[...] -= update
    without = encoder(pixels())
    # Sums of float32 in another order; the update itself is far larger.
    assert np.abs(with_lora - expected).max() < 2e-5 * np.abs(expected).max()
    assert np.abs(without - expected).max() > 1e-2 * np.abs(expected).max()


@pytest.mark.parametrize("name", LAYERS)
def test_gradients_reach_a_layer_in_the_place_of_another(encoder: ImageEncoder, name: str):
    for block in encoder.blocks:
        replace(block, name, lora(layer_of(block, name)))
    loss = lambda model, x: (model(x) ** 2).mean()  # noqa: E731
    gradients = nnx.grad(loss, argnums=nnx.DiffState(0, nnx.LoRAParam))(encoder, pixels())
    leaves = jax.tree.leaves(gradients)
    assert len(leaves) == 2 * len(encoder.blocks)
    assert all(np.abs(leaf).max() > 0 for leaf in leaves)


def test_a_layer_of_ones_own_may_keep_state(encoder: ImageEncoder):
    """Such a block is called where it stands, not in a function of its own."""

    class Counting(nnx.Linear):
        def __call__(self, x):
            self.calls[...] += 1
            return super().__call__(x)

    old = encoder.blocks[0].mlp.lin1
    new = Counting(old.in_features, old.out_features, rngs=nnx.Rngs(0))
    new.calls = nnx.Variable(jnp.zeros((), jnp.int32))
    new.kernel[...], new.bias[...] = old.kernel[...], old.bias[...]
    expected = encoder(pixels())
    encoder.blocks[0].mlp.lin1 = new
    nnx.jit(lambda model, x: model(x))(encoder, pixels())
    np.testing.assert_allclose(encoder(pixels()), expected, atol=1e-5)
    assert int(new.calls[...]) == 2


@pytest.mark.parametrize("name", [*LAYERS, "norm1", "norm2"])
def test_kernels_refuse_a_layer_of_ones_own(encoder: ImageEncoder, name: str, monkeypatch):
    block = encoder.blocks[0]
    if name.startswith("norm"):
        setattr(block, name, nnx.RMSNorm(32, rngs=nnx.Rngs(0)))
    else:
        replace(block, name, lora(layer_of(block, name)))
    monkeypatch.setattr(implementation, "device_problem", lambda: None)
    plan = encoder_plan(encoder.config, None, (8, 8), "mosaic_gpu")[0]
    zeros = jnp.zeros((1, 8, 8, 32))
    with pytest.raises(ValueError, match=f"{name.split('.')[-1]} must be a plain nnx"):
        if name.startswith("mlp") or name == "norm2":
            block._replaced_mlp(zeros.reshape(1, 64, 32), None, plan)
        elif name == "norm1":
            block._norm("norm1", zeros, plan)
        elif name == "attn.qkv":
            block.attn.attend(zeros, zeros, plan, Rankings())
        else:
            block.attn.project(zeros, plan)


def test_another_dot_general_is_used(encoder: ImageEncoder):
    """As quantisation libraries do it: the layer stays an nnx.Linear."""
    calls = []

    def counted(*args, **kwargs):
        calls.append(args[0].shape)
        return jax.lax.dot_general(*args, **kwargs)

    expected = encoder(pixels())
    for block in encoder.blocks:
        block.attn.qkv.dot_general = block.mlp.lin2.dot_general = counted
    np.testing.assert_allclose(encoder(pixels()), expected, atol=1e-5)
    assert len(calls) >= 2 * len(encoder.blocks)


@pytest.mark.parametrize("sparsity", SPARSITIES, ids=["dense", "sparse"])
def test_remat_changes_no_gradient_and_keeps_less(encoder: ImageEncoder, sparsity):
    encoder.set_sparsity(sparsity)
    graph, params = nnx.split(encoder)

    def loss(params, remat: bool):
        model = nnx.merge(graph, params)
        model.remat = remat
        return (model(pixels()) ** 2).mean()

    plain, saved = (jax.jit(jax.grad(loss), static_argnums=1)(params, x) for x in (False, True))
    for one, other in zip(jax.tree.leaves(plain), jax.tree.leaves(saved), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6 * np.abs(one).max() + 1e-12)
    kept = []
    for remat in (False, True):
        _, pullback = jax.vjp(lambda p, remat=remat: loss(p, remat), params)
        kept.append(sum(x.nbytes for x in jax.tree.leaves(pullback)))
    assert kept[1] < 0.5 * kept[0]


def test_remat_is_an_option_of_sam(tmp_path):
    path = random_weights(tmp_path / "sam.safetensors")
    assert Sam.from_pretrained(path, remat=True).image_encoder.remat
    assert Sam(SMALL, remat=True, rngs=nnx.Rngs(0)).image_encoder.remat
    assert not Sam.abstract(SMALL).image_encoder.remat


@pytest.mark.parametrize("sparsity", SPARSITIES, ids=["dense", "sparse"])
def test_blocks_of_a_kind_are_traced_once(sparsity, monkeypatch):
    """Python runs a block's `__call__` only while it is traced."""
    config = dataclasses.replace(
        SMALL.image_encoder, depth=9, global_attn_indexes=(2, 5, 8), mlp_ratio=3.0
    )
    encoder = ImageEncoder(config, sparsity=sparsity, rngs=nnx.Rngs(0))
    traced, original = [], Block.__call__

    def counted(self, x, plan, *args):
        traced.append(plan)
        return original(self, x, plan, *args)

    monkeypatch.setattr(Block, "__call__", counted)
    tables = encoder.tables((8, 8))
    jax.jit(lambda x, tables: encoder(x, tables)).lower(pixels(), tables)
    # Dense: windowed and global. Sparse: of either kind the first ranks, windows behind it route.
    assert len(traced) == len(set(traced)) == (2 if sparsity is None else 5)


@dataclasses.dataclass(frozen=True)
class PlainViT:
    """A ViT without windows and without a position bias, as far as sparsity is concerned."""

    depth: int = 4
    grid_size: int = 16

    @property
    def blocks(self) -> tuple[BlockConfig, ...]:
        block = BlockConfig(
            embed_dim=32,
            num_heads=2,
            mlp_dim=64,
            window_size=None,
            rel_pos_size=None,
            routable=True,
        )
        return (block,) * self.depth

    def other_work(self, tokens: int) -> int:
        return 0


def apply(config: PlainViT, sparsity: Sparsity | None, x: jax.Array) -> jax.Array:
    plans = encoder_plan(config, sparsity, (config.grid_size,) * 2, "xla")
    rankings = Rankings()
    for index, (block, plan) in enumerate(zip(config.blocks, plans, strict=True)):
        layer = Block(block, dtypes=FLOAT32, rngs=nnx.Rngs(index))
        x, rankings = run_block(layer, x, plan, rankings, None)
    return x


def test_a_plain_vit_routes_and_thins_out_without_windows():
    config, sparsity = PlainViT(), Sparsity(0.4, block_size=16)
    routed = [is_routed(config, sparsity, index) for index in range(config.depth)]
    assert routed == [False, True, True, True]
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 16, 16, 32), np.float32))
    dense, sparse = apply(config, None, x), apply(config, sparsity, x)
    np.testing.assert_array_equal(apply(config, Sparsity(1.0, block_size=16), x), dense)
    change = np.linalg.norm(sparse - dense) / np.linalg.norm(dense)
    assert 1e-4 < change < 0.5
    share = encoder_work(config, sparsity).total / encoder_work(config).total
    assert 0.4 < share < 0.8  # projections stay dense


def test_attention_without_position_bias_is_attention():
    """Against softmax(q k^T / sqrt(D)) v, written out."""
    config = PlainViT(depth=1)
    block = Block(config.blocks[0], dtypes=FLOAT32, rngs=nnx.Rngs(0))
    block.attn.qkv.bias[...] = jnp.asarray(np.random.default_rng(1).standard_normal(96, np.float32))
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 16, 16, 32), np.float32))
    plan = encoder_plan(config, None, (16, 16), "xla")[0]
    found, _ = block.attn(x, x, plan, Rankings())
    qkv = block.attn.qkv(x).reshape(2, 256, 3, 2, 16)
    q, k, v = (qkv[:, :, i].swapaxes(1, 2) for i in range(3))
    precision = reference.matmul_precision(q.dtype)
    weights = jax.nn.softmax(jnp.matmul(q, k.swapaxes(2, 3), precision=precision) / 4, axis=-1)
    out = jnp.matmul(weights, v, precision=precision).swapaxes(1, 2).reshape(x.shape)
    np.testing.assert_allclose(found, block.attn.proj(out), atol=2e-5)


def test_a_sam_of_a_new_shape_is_made_at_once():
    """Its values are the same under jit, and have the variance that they should have."""
    config = SamConfig(image_encoder=dataclasses.replace(SMALL.image_encoder, embed_dim=64))
    eager = nnx.state(Sam(config, rngs=nnx.Rngs(3)).image_encoder)
    traced = jax.jit(lambda: nnx.state(Sam(config, rngs=nnx.Rngs(3)).image_encoder))()
    for one, other in zip(jax.tree.leaves(eager), jax.tree.leaves(traced), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-7)
    kernel = eager["blocks"][0]["mlp"]["lin1"]["kernel"][...]
    assert np.std(kernel) == pytest.approx(64**-0.5, rel=0.05)


@pytest.mark.parametrize("sparsity", SPARSITIES, ids=["dense", "sparse"])
def test_a_part_of_a_frame_has_the_frames_positions(encoder: ImageEncoder, sparsity):
    """Against an encoder whose position tables were cut by hand."""
    encoder.set_sparsity(sparsity)
    part, frame = pixels()[:, :, :96], (8, 8)
    found = encoder(part, frame=frame)
    given = encoder(part, encoder.tables((8, 6), frame), frame)
    np.testing.assert_allclose(given, found, atol=1e-6)
    np.testing.assert_array_equal(encoder(pixels(), frame=frame), encoder(pixels()))
    encoder.pos_embed = nnx.Param(encoder.pos_embed[:, :, :6])
    attn = encoder.blocks[1].attn  # the global one: offsets -7 to 7, of which -5 to 5 occur
    attn.rel_pos_w = nnx.Param(attn.rel_pos_w[2:-2])
    np.testing.assert_allclose(found, encoder(part), atol=1e-5)
    with pytest.raises(ValueError, match=r"frame must hold the grid of \(8, 8\) tokens"):
        encoder(pixels(), frame=(8, 6))


def test_prompts_lie_in_the_frame(tmp_path):
    """A decoder on a part of the frame embeds points and positions as the whole frame does."""
    sam = Sam.from_pretrained(random_weights(tmp_path / "sam.safetensors"))
    points, labels = jnp.array([[[[30.0, 40.0]]]]), jnp.array([[[1]]])
    whole = sam.prompt_encoder.dense_position((8, 8))
    embedding = sam.encode(pixels()[:1, :, :96], frame=(8, 8))
    found = sam.decode(embedding, points, labels, frame=(8, 8))
    tokens, dense = sam.prompt_encoder(points, labels, None, image_size=(128, 128), grid=(8, 6))
    expected = sam.mask_decoder(
        embedding.features, whole[:, :6], tokens, labels != -2, dense, multimask_output=True
    )
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one, other)
