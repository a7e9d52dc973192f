"""`products="float8"`: the encoder's linear layers in e4m3, against the same encoder without."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
import pickle
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from models import SMALL, random_weights, trained_like_weights

from pallas_kernels.float8 import LARGEST, dequantize, quantize_rows
from sparsesam_jax import (
    PRESETS,
    ImageEncoderConfig,
    Sam,
    SamConfig,
    SamPredictor,
    Sparsity,
    methods,
)
from sparsesam_jax.checkpoints import native
from sparsesam_jax.model.float8 import PARTS, Float8Linear, chosen_layers, kernel_of
from sparsesam_jax.model.float8_calibration import calibrate_float8, set_float8_scales
from sparsesam_jax.model.float8_scales import bounds, input_scales, scale_for
from sparsesam_jax.model.image_encoder import ImageEncoder
from sparsesam_jax.model.layers import DTypes, gelu
from sparsesam_jax.segment_anything import sam_model_registry
from sparsesam_jax.sparsity.plan import Rankings, encoder_plan

SPARSE = Sparsity(0.4, block_size=16)
LAYERS = ["attn.qkv", "attn.proj", "mlp.lin1", "mlp.lin2"]
# Of a product with a sum of independent terms, one rounding of e4m3 on either side: a number is
# rounded by up to 2^-4 of itself, in the mean square by 2.6 percent.
ROUNDING = 0.04


@pytest.fixture(scope="module")
def weights_file(tmp_path_factory) -> Path:
    return random_weights(tmp_path_factory.mktemp("sam") / "small.safetensors")


@pytest.fixture
def float8(weights_file) -> Sam:
    return Sam.from_pretrained(weights_file, products="float8")


def pixels(batch: int = 2, seed: int = 0) -> jax.Array:
    return jnp.asarray(
        np.random.default_rng(seed).standard_normal((batch, 128, 128, 3), np.float32)
    )


def photos(count: int, seed: int = 0) -> list[np.ndarray]:
    return list(np.random.default_rng(seed).integers(0, 256, (count, 100, 140, 3), np.uint8))


def features(sam: Sam, x: jax.Array | None = None) -> np.ndarray:
    return np.float32(sam.compiled().encode(pixels() if x is None else x).features)


def relative_error(got: np.ndarray, want: np.ndarray) -> float:
    return float(np.linalg.norm(np.float32(got) - want) / np.linalg.norm(want))


def layer_of(block: nnx.Module, name: str) -> Float8Linear:
    part, name = name.split(".")
    return getattr(getattr(block, part), name)


@pytest.mark.parametrize(
    ("sparsity", "dtype"), [(None, "float32"), (SPARSE, "bfloat16")], ids=["dense", "sparse"]
)
def test_is_near_the_encoder_without_it(weights_file: Path, sparsity, dtype: str):
    options = {"sparsity": sparsity, "dtype": dtype}
    plain = Sam.from_pretrained(weights_file, **options)
    rounded = Sam.from_pretrained(weights_file, products="float8", **options)
    encoded = rounded.compiled().encode(pixels()).features
    expected = plain.compiled().encode(pixels()).features
    assert encoded.dtype == expected.dtype
    # Weights and activations without structure: errors of six layers' products add up. And in a
    # sparse encoder, groups of nearly equal importance change places.
    largest = (2 if sparsity is None else 4) * ROUNDING
    assert 0.2 * ROUNDING < relative_error(encoded, np.float32(expected)) < largest
    assert rounded.image_encoder.products == "float8" and plain.image_encoder.products == "dtype"


def test_is_the_encoder_of_dequantised_numbers(weights_file: Path):
    """Every block in float64, by numbers that were rounded and put back, and nothing else."""
    sam = Sam.from_pretrained(weights_file, products="float8")
    encoder = sam.image_encoder
    plans = encoder_plan(encoder.config, None, (8, 8), "xla")
    x = encoder.embed(pixels())
    for block, plan in zip(encoder.blocks, plans, strict=True):
        found, _ = block(x, plan, Rankings())
        reference = Block64(block)
        expected = reference(np.float64(x), plan)
        # The same roundings but for numbers that lie between two of e4m3's, where float32 differs.
        assert relative_error(found, expected) < 3e-3
        x = found


class Block64:
    """A dense block in float8 on a grid, in float64, written out."""

    def __init__(self, block):
        self.block = block

    def __call__(self, x: np.ndarray, plan) -> np.ndarray:
        block, attn = self.block, self.block.attn
        batch, height, width, d = x.shape
        y = self.rows(self.norm(block.norm1, x))
        bias = np.float64(attn.qkv.bias[...])
        qkv = y @ self.weight(attn.qkv) + bias
        window = block.config.window_size
        out = np.zeros_like(x)
        side = window or max(height, width)
        for image, top, left in itertools.product(
            range(batch), range(0, height, side), range(0, width, side)
        ):
            # Padded tokens of a window are zeros behind LayerNorm: queries, keys, values of biases.
            tile = np.tile(bias, (side, side, 1)) if window else np.zeros((height, width, 3 * d))
            part = qkv[image, top : top + side, left : left + side]
            tile[: part.shape[0], : part.shape[1]] = part
            attended = self.attend(tile)[: part.shape[0], : part.shape[1]]
            out[image, top : top + side, left : left + side] = attended
        value_bias = bias[2 * d :]
        scale = float(attn.proj.input_scale[...])
        rounded = self.static(out - value_bias, scale)
        proj = self.weight(attn.proj)
        x = x + rounded @ proj + value_bias @ proj + np.float64(attn.proj.bias[...])
        lin1, lin2 = block.mlp.lin1, block.mlp.lin2
        y = self.rows(self.norm(block.norm2, x))
        hidden = np.float64(gelu(jnp.asarray(y @ self.weight(lin1) + np.float64(lin1.bias[...]))))
        hidden = self.static(hidden, float(lin2.input_scale[...]))
        return x + hidden @ self.weight(lin2) + np.float64(lin2.bias[...])

    def attend(self, qkv: np.ndarray) -> np.ndarray:
        """Attention of one window or grid [side, side, 3 d]."""
        attn = self.block.attn
        rows, cols, d = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
        heads = attn.config.num_heads
        q, k, v = qkv.reshape(rows * cols, 3, heads, -1).transpose(1, 2, 0, 3)
        place = np.arange(rows * cols)
        offsets = [
            (p[:, None] - p[None]) + n - 1 for p, n in ((place // cols, rows), (place % cols, cols))
        ]
        logits = q @ k.transpose(0, 2, 1) * q.shape[-1] ** -0.5
        for table, offset in zip((attn.rel_pos_h, attn.rel_pos_w), offsets, strict=True):
            logits += np.einsum("hqd,qkd->hqk", q, np.float64(table[...])[offset])
        weights = np.exp(logits - logits.max(-1, keepdims=True))
        out = (weights / weights.sum(-1, keepdims=True)) @ v
        return out.transpose(1, 0, 2).reshape(rows, cols, d)

    def norm(self, layer: nnx.LayerNorm, x: np.ndarray) -> np.ndarray:
        x = x - x.mean(-1, keepdims=True)
        x = x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6)
        return x * np.float64(layer.scale[...]) + np.float64(layer.bias[...])

    def rows(self, y: np.ndarray) -> np.ndarray:
        return np.float64(dequantize(quantize_rows(jnp.asarray(y, jnp.float32))))

    def static(self, y: np.ndarray, scale: float) -> np.ndarray:
        rounded = np.clip(y / scale, -LARGEST, LARGEST).astype(np.float32)
        return np.float64(rounded.astype(jnp.float8_e4m3fn)) * scale

    def weight(self, layer: Float8Linear) -> np.ndarray:
        return np.float64(kernel_of(layer, jnp.float32))


def test_weights_take_eight_bits_and_no_copy_stays():
    """A ViT-L's 24 blocks take 0.29 GiB, of which 0.28 are products' weights."""
    whole = PRESETS["vit_l"].image_encoder
    config = dataclasses.replace(whole, depth=2, global_attn_indexes=(1,))
    dtypes = DTypes(jnp.bfloat16, jnp.bfloat16)
    encoder = nnx.eval_shape(
        lambda: ImageEncoder(config, dtypes=dtypes, products="float8", rngs=nnx.Rngs(0))
    )
    leaves = jax.tree.leaves(nnx.state(encoder.blocks[0]))
    large = [x for x in leaves if x.size >= 2**20]
    assert all(x.dtype == jnp.float8_e4m3fn for x in large) and len(large) == 4
    size = sum(x.size * x.dtype.itemsize for x in leaves)
    assert 0.28 * 2**30 < 24 * size < 0.29 * 2**30


@pytest.mark.parametrize("param_dtype", ["float32", "bfloat16", "float16"])
def test_weights_are_those_of_the_file_whatever_the_parameters_dtype(weights_file, param_dtype):
    sam = Sam.from_pretrained(weights_file, products="float8", param_dtype=param_dtype)
    _, arrays = native.read(weights_file)
    for index, name in itertools.product(range(3), LAYERS):
        layer = layer_of(sam.image_encoder.blocks[index], name)
        kernel = arrays[f"image_encoder.blocks.{index}.{name}.kernel"]
        rounded = kernel_of(layer, jnp.float32)
        largest = np.abs(kernel).max(0)
        # Half of a unit in the last place of three bits, and of the smallest number, 2^-9.
        assert (
            np.abs(rounded - kernel)
            <= np.maximum(np.abs(kernel) / 16, largest / 448 / 1024) * 1.0001
        ).all()
        assert layer.bias[...].dtype == param_dtype


def test_a_model_in_memory_is_put_into_float8_as_a_file_is(weights_file: Path, float8: Sam):
    sam = Sam.from_pretrained(weights_file)
    sam.image_encoder.quantise()
    for one, other in zip(*(jax.tree.leaves(nnx.state(x)) for x in (sam, float8)), strict=True):
        np.testing.assert_array_equal(np.float32(one), np.float32(other))
    random = Sam(SMALL, products="float8", rngs=nnx.Rngs(0))
    assert np.isfinite(features(random)).all()


@pytest.mark.parametrize("scale", [1.0, 1e3])
def test_bounds_hold_for_every_input(float8: Sam, scale: float):
    """For inputs that make one channel as large as it can be."""
    block = float8.image_encoder.blocks[0]
    for norm in (block.norm1, block.norm2):
        norm.scale[...] *= scale
        norm.bias[...] *= scale
    kernels = (
        kernel_of(block.attn.qkv, jnp.float32)[:, 2 * block.config.embed_dim :],
        kernel_of(block.mlp.lin1, jnp.float32),
    )
    found = []
    for norm, kernel in zip((block.norm1, block.norm2), kernels, strict=True):
        worst = np.float32(norm.scale[...])[:, None] * np.float32(kernel)
        worst = np.concatenate([worst, -worst], axis=1).T  # [2 n, d], one input a channel
        rows = quantize_rows(norm(jnp.asarray(worst)))
        found.append(np.float32(dequantize(rows)) @ np.float32(kernel))
    hidden = np.abs(gelu(jnp.asarray(found[1]) + block.mlp.lin1.bias[...]))
    limits = [float(x) for x in bounds(block)]
    assert 0.8 * limits[0] < np.abs(found[0]).max() < limits[0]
    assert 0.8 * limits[1] < hidden.max() < limits[1]
    for parameter in (block.norm1.scale, block.norm1.bias):
        parameter[...] = jnp.zeros_like(parameter[...])
    assert scale_for(bounds(block)[0]) == 1


@pytest.mark.parametrize("largest", [1e-20, 0.1, 224.0, 300.0, 447.9, 448.0, 1e10])
def test_scales_are_powers_of_two(largest: float):
    scale = float(scale_for(jnp.float32(largest)))
    assert np.log2(scale) == round(np.log2(scale))
    assert 224 <= np.float32(largest) / scale < 448


def test_calibration_takes_photos_and_saturates_nothing(weights_file: Path, float8: Sam):
    plain = features(Sam.from_pretrained(weights_file))
    before = {name: float(x[...]) for name, x in input_scales(float8.image_encoder.blocks).items()}
    error = relative_error(features(float8), plain)
    found = calibrate_float8(float8, photos(2))
    assert found.keys() == {f"{i}.{name}" for i in range(3) for name in ("proj", "lin2")}
    assert all(found[name] <= before[name] for name in found)
    assert any(found[name] < before[name] for name in found)
    assert relative_error(features(float8), plain) < 1.2 * error
    again = Sam.from_pretrained(weights_file, products="float8")
    set_float8_scales(again, json.loads(json.dumps(found)))
    np.testing.assert_array_equal(features(again), features(float8))


def test_calibration_says_what_is_wrong(weights_file: Path, float8: Sam):
    with pytest.raises(ValueError, match="sam must have products=\"float8\", got 'dtype'"):
        calibrate_float8(Sam.from_pretrained(weights_file), photos(1))
    with pytest.raises(ValueError, match="photos must hold at least one"):
        calibrate_float8(float8, [])
    with pytest.raises(ValueError, match=r"headroom must be at least 1, got 0\.5"):
        calibrate_float8(float8, photos(1), headroom=0.5)
    with pytest.raises(ValueError, match=r"found must be positive scales of 0\.proj, 0\.lin2"):
        set_float8_scales(float8, {"0.proj": 1.0})
    with pytest.raises(ValueError, match="for the model is not in float8"):
        set_float8_scales(Sam.from_pretrained(weights_file), {"0.proj": 1.0})


def test_layers_are_chosen_by_patterns(weights_file: Path):
    assert chosen_layers(None, 2) == [*itertools.product(range(2), PARTS)]
    assert chosen_layers(["*.qkv", "1.lin?"], 2) == [
        (0, "qkv"),
        (1, "qkv"),
        (1, "lin1"),
        (1, "lin2"),
    ]
    assert chosen_layers(["!0.*", "!*.lin2"], 2) == [(1, "qkv"), (1, "proj"), (1, "lin1")]
    for wrong, text in ((["2.qkv"], "got '2.qkv'"), (["!*"], "must leave a layer"), ([], "leave")):
        with pytest.raises(ValueError, match=f"float8_layers .*{text}"):
            chosen_layers(wrong, 2)
    with pytest.raises(ValueError, match='float8_layers needs products="float8"'):
        Sam.abstract(SMALL, float8_layers=["*.qkv"])


@pytest.mark.parametrize("names", [("qkv", "lin2"), ("proj", "lin1")], ids="-".join)
def test_every_layer_may_stay_as_it_is(weights_file: Path, float8: Sam, names: tuple[str, str]):
    """Two of the four in float8, and two not, in every neighbourhood that there is."""
    sam = Sam.from_pretrained(
        weights_file, products="float8", float8_layers=[f"*.{name}" for name in names]
    )
    for name in LAYERS:
        chosen = name.split(".")[1] in names
        assert isinstance(layer_of(sam.image_encoder.blocks[2], name), Float8Linear) == chosen
    plain = features(Sam.from_pretrained(weights_file))
    whole = relative_error(features(float8), plain)
    assert 0.3 * whole < relative_error(features(sam), plain) < whole
    with pytest.raises(NotImplementedError, match="has no gradient"):
        jax.eval_shape(jax.grad(lambda x: sam.image_encoder(x).sum()), pixels(1))


def lora(layer: Float8Linear | nnx.Linear) -> nnx.LoRALinear:
    """The layer with an update of rank 2, its kernel what products multiply with."""
    new = nnx.LoRALinear(layer.in_features, layer.out_features, lora_rank=2, rngs=nnx.Rngs(0))
    new.kernel[...], new.bias[...] = kernel_of(layer, jnp.float32), layer.bias[...]
    rng = np.random.default_rng(0)
    for factor in (new.lora.lora_a, new.lora.lora_b):
        factor[...] = jnp.asarray(0.1 * rng.standard_normal(factor.shape, np.float32))
    return new


@pytest.mark.parametrize(
    "names", [("attn.qkv", "mlp.lin2"), ("attn.proj", "mlp.lin1")], ids="-".join
)
def test_a_layer_in_the_place_of_another_is_used(float8: Sam, names: tuple[str, str]):
    """Beside others in float8, which then quantise what they get by themselves."""
    encoder, before = float8.image_encoder, features(float8)
    for block, name in itertools.product(encoder.blocks, names):
        part, attribute = name.split(".")
        setattr(getattr(block, part), attribute, lora(layer_of(block, name)))
        assert block.is_replaced
    after = features(float8)
    for block, name in itertools.product(encoder.blocks, names):
        layer_of(block, name).lora.lora_b[...] *= 0
    assert relative_error(after, before) > 2 * ROUNDING
    assert relative_error(features(float8), before) < 1.2 * ROUNDING
    with pytest.raises(ValueError, match="block 0 must have SAM's own layers"):
        encoder.quantise()


def test_the_layer_alone_is_what_blocks_compute(float8: Sam):
    """What methods call, by the same numbers: LayerNorm apart from its quantisation."""
    for block in float8.image_encoder.blocks:
        x = jax.random.normal(jax.random.key(1), (1, 8, 8, 32))
        plan = encoder_plan(float8.image_encoder.config, None, (8, 8), "xla")
        plan = plan[0] if block.config.window_size else plan[1]
        whole, _ = block(x, plan, Rankings())
        attended, _ = block.attn(block.norm1(x), x, plan, Rankings())
        apart = x + attended
        apart = apart + block.mlp(block.norm2(apart))
        assert relative_error(apart, np.float32(whole)) < 2e-3


@pytest.mark.parametrize("remat", [False, True])
def test_it_has_no_gradient_and_says_so(float8: Sam, remat: bool):
    """For pixels, and for parameters that only quantised numbers depend on."""
    encoder = float8.image_encoder
    encoder.remat = remat
    graph, state = nnx.split(encoder)
    leaves, tree = jax.tree.flatten(state)
    names = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(state)]

    def loss(value, index=None):
        given = [*leaves]
        if index is None:
            return nnx.merge(graph, state)(value).sum()
        given[index] = value
        return nnx.merge(graph, jax.tree.unflatten(tree, given))(pixels(1)).sum()

    with pytest.raises(NotImplementedError, match='products="float8" has no gradient'):
        jax.eval_shape(jax.grad(loss), pixels(1))
    last = [i for i, name in enumerate(names) if "blocks'][2]" in name and "rel_pos" not in name]
    assert len(last) == 18  # of which a weight is two: e4m3 and scales
    for index in last[:: 1 if not remat else 6]:
        with pytest.raises(NotImplementedError, match='products="float8" has no gradient'):
            jax.eval_shape(jax.grad(lambda x, i=index: loss(x, i)), leaves[index])


def test_the_decoder_has_a_gradient(float8: Sam):
    """Where the encoder is before it in the same function, but not what is differentiated by."""
    points, labels = jnp.array([[[[30.0, 40.0]]]]), jnp.array([[[1]]])
    graph, state = nnx.split(float8)
    tuned = state["mask_decoder"]

    def loss(tuned):
        model = nnx.merge(graph, nnx.State({**state, "mask_decoder": tuned}))
        return model.decode(model.encode(pixels(1)), points, labels)[0].sum()

    gradients = jax.eval_shape(jax.grad(loss), tuned)
    assert jax.tree.structure(gradients) == jax.tree.structure(tuned)


def test_it_travels(weights_file: Path, float8: Sam):
    """Pickled, copied, with another sparsity, with remat, exported: the same numbers."""
    expected = features(float8)
    for other in (pickle.loads(pickle.dumps(float8)), copy.deepcopy(float8)):
        np.testing.assert_array_equal(features(other), expected)
    sparse = float8.with_sparsity(SPARSE)
    shared = [
        x.image_encoder.blocks[0].attn.qkv.kernel.get_value().values for x in (float8, sparse)
    ]
    assert shared[0] is shared[1]
    np.testing.assert_array_equal(features(sparse.with_sparsity(None)), expected)
    graph, state = nnx.split(float8.image_encoder)
    leaves, tree = jax.tree.flatten(state)
    program = jax.jit(lambda leaves, x: nnx.merge(graph, jax.tree.unflatten(tree, leaves))(x))
    exported = jax.export.export(program)(
        leaves, jax.ShapeDtypeStruct((2, 128, 128, 3), jnp.float32)
    )
    restored = jax.export.deserialize(exported.serialize())
    np.testing.assert_allclose(restored.call(leaves, pixels()), expected, atol=1e-5)


def test_a_checkpoint_is_not_written(float8: Sam, tmp_path: Path):
    path = tmp_path / "float8.safetensors"
    with pytest.raises(ValueError, match='must have products="dtype" to be saved, got "float8"'):
        float8.save_pretrained(path)
    assert not path.exists()


def test_weights_that_are_not_finite_are_named(weights_file: Path, tmp_path: Path):
    config, arrays = native.read(weights_file)
    name = "image_encoder.blocks.1.mlp.lin2.kernel"
    arrays[name] = arrays[name].copy()
    arrays[name][0, 0] = np.nan
    native.write(tmp_path / "nan.safetensors", config, arrays)
    with pytest.raises(ValueError, match=f"must be finite, got NaN or an infinity in {name}"):
        Sam.from_pretrained(tmp_path / "nan.safetensors", products="float8")


def test_embeddings_tell_of_it_and_fit_every_decoder(weights_file: Path, float8: Sam):
    predictors = [SamPredictor(x) for x in (float8, Sam.from_pretrained(weights_file))]
    for predictor in predictors:
        predictor.set_image(photos(1)[0])
    one, other = (predictor.embedding for predictor in predictors)
    assert one.fingerprint == f"{other.fingerprint}-float8"
    decoder = SamPredictor(Sam.decoder_from_pretrained(weights_file))
    box = np.array([20.0, 20.0, 90.0, 80.0])
    for embedding, predictor in zip((one, other), predictors, strict=True):
        decoder.embedding = embedding
        expected = predictor.predict(box=box, multimask_output=False)
        for got, want in zip(
            decoder.predict(box=box, multimask_output=False), expected, strict=True
        ):
            np.testing.assert_allclose(got, want, atol=1e-4)
    predictors[1].embedding = one


def test_methods_run_on_it(weights_file: Path):
    """They call the layers themselves, one by one."""
    plain, rounded = (
        methods.apply(Sam.from_pretrained(weights_file, products=products), "sparge", 0.5)
        for products in ("dtype", "float8")
    )
    assert rounded.image_encoder.products == "float8"
    error = relative_error(features(rounded, pixels(1)), features(plain, pixels(1)))
    assert 0.1 * ROUNDING < error < 6 * ROUNDING  # what is alike may be chosen otherwise


def test_metas_names_take_it():
    sam = sam_model_registry["vit_t"](products="float8")
    assert sam.sam.image_encoder.products == "float8"


# A ViT-L is 24 such blocks, too slow for a CPU's tests.
FOUR_BLOCKS = SamConfig(
    image_encoder=ImageEncoderConfig(
        embed_dim=128,
        depth=4,
        num_heads=4,
        global_attn_indexes=(1, 3),
        image_size=128,
        window_size=5,
        out_chans=64,
    ),
    decoder_mlp_dim=64,
)


def test_features_with_outlier_channels(tmp_path: Path):
    """Weights whose spectra, updates and outliers are those of trained ones."""
    path = trained_like_weights(tmp_path / "sam.safetensors", FOUR_BLOCKS)
    plain = features(Sam.from_pretrained(path))
    sam = Sam.from_pretrained(path, products="float8")
    assert 2e-3 < relative_error(features(sam), plain) < 2.5e-2
    calibrate_float8(sam, photos(1))
    assert 2e-3 < relative_error(features(sam), plain) < 2.5e-2
