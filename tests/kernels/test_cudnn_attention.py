"""The algebra that brings block layouts and position biases to cuDNN, with XLA in its place."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import BlockLayout, cudnn_attention, reference

BATCH, SIDE, HEADS, DIM, WINDOW = 2, 12, 3, 8, 5
SEQ_LEN = SIDE * SIDE
TOLERANCE = 2e-5  # float32 rounding of a few hundred sums of terms of size 1


@pytest.fixture(params=[256, 16], ids=["folded", "written out"])
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """XLA attends, to heads that hold the position bias's columns or not."""
    attend = functools.partial(cudnn_attention.attend, widest=request.param, library="xla")
    monkeypatch.setattr(cudnn_attention, "attend", attend)


def inputs(*shape: int, side: int, biased: bool, scale: float = 1.0) -> list[Any]:
    rng = np.random.default_rng(0)
    arrays = [
        jnp.asarray(scale * rng.standard_normal((*shape, HEADS, size)), jnp.float32)
        for size in (DIM, DIM, DIM, side, side)
    ]
    return [*arrays[:3], *(arrays[3:] if biased else (None, None))]


def orders(kind: str, lead: tuple[int, ...], length: int) -> np.ndarray:
    shape = {"shared": (), "per_image": lead, "per_head": (*lead, HEADS)}[kind]
    return np.random.default_rng(1).permuted(
        np.broadcast_to(np.arange(length), (*shape, length)), axis=-1
    )


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("density", [0.01, 0.3, 1.0])
@pytest.mark.parametrize("order", ["shared", "per_image", "per_head", "blocks"])
@pytest.mark.parametrize("biased", [True, False])
def test_stripe_attention(density: float, order: str, biased: bool):
    layout = BlockLayout.a_shape(SEQ_LEN, density, block_q=16, block_kv=16)
    block_order = None
    if order == "blocks":
        block_order = jnp.asarray(orders("per_image", (BATCH,), layout.num_kv_blocks))
    sequence = orders("shared" if order == "blocks" else order, (BATCH,), SEQ_LEN)
    # Logits far from zero, where a weight that is rounded or out of range would show.
    args = inputs(BATCH, SEQ_LEN, side=SIDE, biased=biased, scale=2.0)
    options: dict[str, Any] = dict(layout=layout, block_order=block_order)
    places = (sequence // SIDE, sequence % SIDE)
    got, want = (
        jax.jit(lambda *args, f=f: f(*args, *places, **options))(*args)
        for f in (cudnn_attention.stripe_attention, reference.stripe_attention)
    )
    np.testing.assert_allclose(got, want, atol=4 * TOLERANCE)


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("order", ["dense", "shared", "per_image", "per_head"])
@pytest.mark.parametrize("biased", [True, False])
def test_window_attention(order: str, biased: bool):
    layout, sequence, tokens = None, None, WINDOW**2
    windows = (-(-SIDE // WINDOW)) ** 2
    if order != "dense":
        layout = BlockLayout.bar(tokens, 0.3, block_q=8, block_kv=8)
        sequence = jnp.asarray(orders(order, (BATCH, windows), tokens))
    args = inputs(BATCH, SIDE, SIDE, side=WINDOW, biased=biased)
    options: dict[str, Any] = dict(window_size=WINDOW, layout=layout, order=sequence)
    got, want = (
        jax.jit(lambda *args, f=f: f(*args, **options))(*args)
        for f in (cudnn_attention.window_attention, reference.window_attention)
    )
    np.testing.assert_allclose(got, want, atol=TOLERANCE)


@pytest.mark.usefixtures("library")
def test_gradient_equals_the_references():
    layout = BlockLayout.a_shape(SEQ_LEN, 0.3, block_q=16, block_kv=16)
    places = np.divmod(orders("shared", (), SEQ_LEN), SIDE)
    args = inputs(BATCH, SEQ_LEN, side=SIDE, biased=True)
    weight = np.random.default_rng(4).standard_normal(args[0].shape).astype(np.float32)
    got, want = (
        jax.jit(jax.grad(lambda args, f=f: (f(*args, *places, layout=layout) * weight).sum()))(args)
        for f in (cudnn_attention.stripe_attention, reference.stripe_attention)
    )
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("gap", [-60.0, 60.0])
def test_bar_and_diagonal_of_very_different_weight(gap: float):
    """Whichever holds all the weight, the output is its own, and no weight is infinite or NaN."""
    layout = BlockLayout.a_shape(SEQ_LEN, 0.3, block_q=16, block_kv=16)
    places = np.divmod(np.arange(SEQ_LEN), SIDE)
    q, k, v, rel_h, rel_w = inputs(BATCH, SEQ_LEN, side=SIDE, biased=True)
    rows = layout.bar_len // SIDE  # of the map, that lie in the bar
    rel_h = rel_h.at[..., :rows].add(gap)
    args = (q, k, v, rel_h, rel_w)
    got = cudnn_attention.stripe_attention(*args, *places, layout=layout)
    want = reference.stripe_attention(*args, *places, layout=layout)
    np.testing.assert_allclose(got, want, atol=1e-4)


def test_no_library_on_a_cpu():
    assert cudnn_attention.widest_head() == 0
    assert not cudnn_attention.runs(jnp.bfloat16, 64)


@pytest.mark.gpu
@pytest.mark.parametrize("widest", [256, 128], ids=["folded", "written out"])
@pytest.mark.parametrize("head_dim", [64, 80])
@pytest.mark.parametrize("order", ["dense", "tiles", "groups"])
def test_on_a_gpu(monkeypatch: pytest.MonkeyPatch, widest: int, head_dim: int, order: str):
    """bfloat16 and its gradients through cuDNN, beside the reference in float32."""
    monkeypatch.setattr(cudnn_attention, "widest_head", lambda: widest)
    side, rng = 64, np.random.default_rng(0)
    layout = BlockLayout.a_shape(side**2, 1.0 if order == "dense" else 0.3)
    lead = () if order == "tiles" else (2,)
    sequence = rng.permuted(np.broadcast_to(np.arange(side**2), (*lead, side**2)), axis=-1)
    places = np.divmod(sequence, side)
    shapes = [(2, side**2, 4, size) for size in (head_dim,) * 3 + (side, side)]
    args = [jnp.asarray(rng.standard_normal(shape), jnp.bfloat16) for shape in shapes]
    weight = jnp.asarray(rng.standard_normal(shapes[0]), jnp.float32)

    def both(attend, args):
        def loss(args):
            out = attend(*args, *places, layout=layout).astype(jnp.float32)
            return (out * weight).sum(), out

        gradients, out = jax.grad(loss, has_aux=True)(args)
        return [out, *gradients]

    got = jax.jit(functools.partial(both, cudnn_attention.stripe_attention))(args)
    exact = [x.astype(jnp.float32) for x in args]
    want = jax.jit(functools.partial(both, reference.stripe_attention))(exact)
    for a, b in zip(got, want, strict=True):
        a = a.astype(jnp.float32)
        assert jnp.linalg.norm((a - b).ravel()) < 1e-2 * jnp.linalg.norm(b.ravel())


@pytest.mark.gpu
def test_windows_on_a_gpu():
    rng = np.random.default_rng(0)
    shapes = [(2, 64, 64, 4, size) for size in (64, 64, 64, 14, 14)]
    args = [jnp.asarray(rng.standard_normal(shape), jnp.bfloat16) for shape in shapes]
    for layout in (None, BlockLayout.bar(196, 0.3)):
        options: dict[str, Any] = dict(window_size=14, layout=layout, order=rng.permutation(196))
        got = jax.jit(functools.partial(cudnn_attention.window_attention, **options))(*args)
        exact = [x.astype(jnp.float32) for x in args]
        want = jax.jit(functools.partial(reference.window_attention, **options))(*exact)
        difference = jnp.linalg.norm((got.astype(jnp.float32) - want).ravel())
        assert difference < 1e-2 * jnp.linalg.norm(want.ravel())
