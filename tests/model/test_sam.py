"""The model as a JAX program: jit, vmap, split and merge, donation, export, sizes and dtypes."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from models import SMALL, random_weights

from sparsesam_jax import PRESETS, Sam, Sparsity
from sparsesam_jax.model.prompt_encoder import ABSENT
from sparsesam_jax.model.sam import ImageEmbedding

SPARSE = Sparsity(0.3, block_size=16)
POINTS = jnp.array([[[[30.0, 40.0], [90.0, 80.0]]]])
LABELS = jnp.array([[[1, 0]]])


@pytest.fixture(scope="module")
def weights_file(tmp_path_factory):
    return random_weights(tmp_path_factory.mktemp("sam") / "small.safetensors")


@pytest.fixture(scope="module", params=[None, SPARSE], ids=["dense", "sparse"])
def sam(request, weights_file) -> Sam:
    return Sam.from_pretrained(weights_file, sparsity=request.param)


def photos(batch: int, height: int = 100, width: int = 140, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (batch, height, width, 3), np.uint8)


def pixels(batch: int, size: int = 128, seed: int = 0) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), (batch, size, size, 3))


def pure(sam: Sam):
    """The encoder as a pure function of its state."""
    graphdef, state = nnx.split(sam.image_encoder)
    return lambda state, x: nnx.merge(graphdef, state)(x), state


# One function, so that tests share its compilations: those are what takes time here.
encode_jitted = nnx.jit(lambda encoder, x: encoder(x))


def relative_error(got: jax.Array, want: jax.Array) -> float:
    return float(np.linalg.norm(np.float32(got) - want) / np.linalg.norm(want))


def encode(sam: Sam, x: jax.Array) -> jax.Array:
    """The encoder's features."""
    return encode_jitted(sam.image_encoder, x)


def test_whole_function_under_jit(sam: Sam):
    """Pixels and prompts to masks, pre- and postprocessing included, in one jitted function."""
    graphdef, state = nnx.split(sam)

    @jax.jit
    def segment(state, *inputs):
        model = nnx.merge(graphdef, state)
        return model(*inputs), model(*inputs, return_logits=True)

    images = jnp.asarray(photos(2))
    points, labels = (jnp.tile(x, (2, 3, 1, 1)[: x.ndim]) for x in (POINTS, LABELS))
    out, logits = segment(state, images, points, labels)
    assert out.masks.shape == (2, 3, 3, 100, 140)
    assert out.masks.dtype == jnp.bool_
    assert out.iou_predictions.shape == (2, 3, 3)
    assert out.low_res_logits.shape == (2, 3, 3, 32, 32)
    np.testing.assert_allclose(out.low_res_logits, logits.low_res_logits, atol=1e-3)
    assert (np.asarray(out.masks) == (np.asarray(logits.masks) > 0)).mean() > 0.999


def test_batch_is_image_by_image(sam: Sam):
    x = pixels(2)
    together = encode(sam, x)
    alone = jnp.concatenate([encode(sam, x[i : i + 1]) for i in range(2)])
    np.testing.assert_allclose(together, alone, atol=1e-4)


def test_vmap(sam: Sam):
    function, state = pure(sam)
    x = pixels(2)
    mapped = jax.jit(jax.vmap(lambda x: function(state, x[None])[0]))(x)
    np.testing.assert_allclose(mapped, encode(sam, x), atol=1e-4)


def test_donation(sam: Sam):
    function, state = pure(sam)
    x = pixels(1)
    expected = encode(sam, x)
    donated = jax.jit(function, donate_argnums=1)(state, x + 0)
    np.testing.assert_allclose(donated, expected, atol=1e-4)


def test_export(sam: Sam):
    """The XLA path leaves as a serialised program and comes back the same function."""
    function, state = pure(sam)
    leaves, tree = jax.tree.flatten(state)
    exported = jax.export.export(jax.jit(lambda leaves, x: function(tree.unflatten(leaves), x)))(
        leaves, jax.ShapeDtypeStruct((1, 128, 128, 3), jnp.float32)
    )
    restored = jax.export.deserialize(exported.serialize())
    x = pixels(1)
    np.testing.assert_allclose(restored.call(leaves, x), encode(sam, x), atol=1e-4)


def test_gradient(sam: Sam):
    """Every parameter of the encoder has a finite gradient, and nearly all a nonzero one."""
    graphdef, parameters, rest = nnx.split(sam.image_encoder, nnx.Param, ...)
    target = pixels(1, size=8, seed=1)[..., :1]

    def loss(parameters):
        return (nnx.merge(graphdef, parameters, rest)(pixels(1)) * target).sum()

    gradients = jax.tree.leaves(jax.jit(jax.grad(loss))(parameters))
    assert all(np.isfinite(g).all() for g in gradients)
    assert all(np.abs(g).max() > 0 for g in gradients)


@pytest.mark.parametrize("size", [(160, 160), (64, 96)], ids=str)
def test_other_input_sizes(sam: Sam, size: tuple[int, int]):
    """Position tables are interpolated; the grid need not be square."""
    x = jax.random.normal(jax.random.key(0), (1, *size, 3))
    features = encode(sam, x)
    assert features.shape == (1, size[0] // 16, size[1] // 16, 32)
    assert np.isfinite(features).all()


def test_tables_made_beforehand_change_nothing(sam: Sam):
    encoder, x = sam.image_encoder, pixels(1)
    tables = encoder.tables((x.shape[1] // 16, x.shape[2] // 16))
    run = nnx.jit(lambda encoder, x, tables: encoder(x, tables))
    np.testing.assert_allclose(run(encoder, x, tables), encode(sam, x), atol=1e-5)
    with pytest.raises(ValueError, match="tables must have one entry a block"):
        encoder(x, tables[:1])
    with pytest.raises(ValueError, match="rel_pos_h must have"):
        encoder(x, encoder.tables((3, 3)))


def test_position_tables_interpolate_as_torch_does():
    torch = pytest.importorskip("torch")
    from sparsesam_jax.model.blocks import relative_table

    table = np.random.default_rng(0).standard_normal((27, 8)).astype(np.float32)
    for grid in (9, 14, 20):
        resized = torch.nn.functional.interpolate(
            torch.tensor(table.T[None]), size=2 * grid - 1, mode="linear"
        )[0].T.numpy()
        coords = np.arange(grid)[:, None] - np.arange(grid)[None] + grid - 1
        np.testing.assert_allclose(
            relative_table(jnp.asarray(table), grid, None), resized[coords], atol=1e-5
        )


@pytest.mark.parametrize(
    ("sparsity", "dtype", "param_dtype"),
    [
        (None, jnp.bfloat16, jnp.float32),
        (None, jnp.float16, None),
        (SPARSE, jnp.bfloat16, None),
        (SPARSE, jnp.float16, jnp.float32),
    ],
    ids=["dense-bfloat16", "dense-float16", "sparse-bfloat16", "sparse-float16"],
)
def test_low_precision(weights_file, sparsity, dtype, param_dtype):
    """16 bit compute stays within its rounding of float32, with either parameter dtype."""
    # The rounded keys can rank differently; the order is not what this test is about.
    sparsity = sparsity and dataclasses.replace(sparsity, importance="uniform")
    reference = Sam.from_pretrained(weights_file, sparsity=sparsity)
    reference = encode(reference, pixels(1))
    sam = Sam.from_pretrained(weights_file, sparsity=sparsity, dtype=dtype, param_dtype=param_dtype)
    out = encode(sam, pixels(1))
    assert out.dtype == dtype
    assert sam.image_encoder.pos_embed[...].dtype == (param_dtype or dtype)
    error = relative_error(out, reference)
    assert error < {jnp.bfloat16: 3e-2, jnp.float16: 4e-3}[dtype]


def test_density_one_is_the_dense_function(weights_file):
    dense = Sam.from_pretrained(weights_file)
    x = pixels(2)
    expected = encode(dense, x)
    for sparsity in (Sparsity(1), Sparsity(1.0), Sparsity.released(1), Sparsity((1.0,) * 3)):
        out = encode(dense.with_sparsity(sparsity), x)
        np.testing.assert_array_equal(out, expected)


def test_with_sparsity_shares_parameters(weights_file):
    dense = Sam.from_pretrained(weights_file)
    sparse = dense.with_sparsity(SPARSE)
    assert dense.image_encoder.sparsity is None
    assert sparse.image_encoder.sparsity == SPARSE
    ours, theirs = (jax.tree.leaves(nnx.state(model)) for model in (dense, sparse))
    assert all(a is b for a, b in zip(ours, theirs, strict=True))


def test_absent_points_change_nothing(weights_file):
    """Prompts padded with absent points give the masks of the prompts alone."""
    sam = Sam.from_pretrained(weights_file)
    embedding = ImageEmbedding(jax.random.normal(jax.random.key(0), (1, 8, 8, 32)), None)
    decode = nnx.jit(lambda sam, *args: sam.decode(*args))
    alone = decode(sam, embedding, POINTS, LABELS)
    points = jnp.pad(POINTS, ((0, 0), (0, 0), (0, 6), (0, 0)), constant_values=77.0)
    labels = jnp.pad(LABELS, ((0, 0), (0, 0), (0, 6)), constant_values=ABSENT)
    padded = decode(sam, embedding, points, labels)
    for a, b in zip(alone, padded, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)


def flops(sam: Sam) -> float:
    """Of one image, by XLA's count; the parameters may be abstract."""
    graphdef, state = nnx.split(sam.image_encoder)
    size = sam.config.image_encoder.image_size
    pixels = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    lowered = jax.jit(lambda state, x: nnx.merge(graphdef, state)(x)).lower(state, pixels)
    return lowered.cost_analysis()["flops"]


def test_sparsity_saves_work():
    """ViT-L: dense within 5 % of 2 x 1420 GFLOP (windows without padding), 0.3 at most 0.70."""
    sam = Sam.abstract(PRESETS["vit_l"], implementation="xla")
    dense = flops(sam)
    assert dense == pytest.approx(2 * 1420e9, rel=0.05)
    assert flops(sam.with_sparsity(Sparsity(0.3))) <= 0.70 * dense
    assert flops(sam.with_sparsity(Sparsity.released(0.3))) <= 0.70 * dense


def test_residual_dtype(tmp_path):
    """By default the stream of a bfloat16 model is float16, for that is closer to float32."""
    deep = dataclasses.replace(
        SMALL, image_encoder=dataclasses.replace(SMALL.image_encoder, depth=12)
    )
    path, x = random_weights(tmp_path / "deep.safetensors", deep), pixels(1)

    def run(dtype, residual_dtype=None) -> tuple[jax.Array, jax.Array]:
        dtypes = {"dtype": dtype, "param_dtype": jnp.bfloat16, "residual_dtype": residual_dtype}
        encoder = Sam.from_pretrained(path, **dtypes).image_encoder
        stream = nnx.jit(lambda encoder, x: encoder.block_outputs(x)[-1])(encoder, x)
        return stream, nnx.jit(lambda encoder, x: encoder.neck_features(x))(encoder, stream)

    _, want = run(jnp.float32)
    errors = []
    for chosen, expected in ((None, jnp.float16), (jnp.bfloat16, jnp.bfloat16)):
        stream, features = run(jnp.bfloat16, chosen)
        assert (stream.dtype, features.dtype) == (expected, jnp.bfloat16)
        errors.append(relative_error(features, want))
    assert errors[0] < 0.8 * errors[1]
    assert run(jnp.float16)[0].dtype == jnp.float16


def test_errors(weights_file, tmp_path):
    sam = Sam.from_pretrained(weights_file)
    with pytest.raises(ValueError, match=r"pixels must be .* divisible by 16"):
        sam.image_encoder(jnp.zeros((1, 100, 128, 3)))
    with pytest.raises(ValueError, match="density must have one value a block"):
        sam.with_sparsity(Sparsity((0.5, 0.5)))
    with pytest.raises(ValueError, match="mlp_start must lie behind"):
        sam.with_sparsity(Sparsity(0.5, mlp_start=1))
    with pytest.raises(ValueError, match="weights must be the name of embedded ones"):
        Sam.from_pretrained(tmp_path / "missing.safetensors")
    with pytest.raises(ValueError, match="dtype must be float32, bfloat16 or float16"):
        Sam.from_pretrained(weights_file, dtype=jnp.float64)
    with pytest.raises(ValueError, match="residual_dtype must be float32, bfloat16 or float16"):
        Sam.from_pretrained(weights_file, residual_dtype=jnp.int8)
