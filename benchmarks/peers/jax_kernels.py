"""This project's functions of the kernels suite and of tuning, by XLA or as Mosaic GPU kernels.

A kernel is what its module's `prepare` and `launch` make of a case's arrays.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from benchmarks.cases.kernel_cases import Case
from benchmarks.peers.jax_models import JAX, needs_gpu, on_gpu
from benchmarks.run.timing import Runnable
from pallas_kernels import (
    gather_norm_kernel,
    matmul_kernel,
    mlp_reference,
    reference,
    relative_position,
    routed_mlp,
    stripe_attention,
    stripe_schedule,
    tuning,
    window_attention,
    window_kernel,
)
from pallas_kernels.mlp_weights import MLPWeights

COPIES = 5  # of a function in one program: XLA makes a CUDA graph of five launches or more
SAMPLE = 256  # rows of a part of the MLP that are compared
REPEATS = 20  # of a whole MLP, which must agree to the bit
EPSILON = 1e-6
CONFIGS = {  # of kernels that have one
    "stripe": stripe_schedule.Config,
    "window": window_kernel.Config,
    "lin1": matmul_kernel.Config,
    "lin2": matmul_kernel.Config,
}
Arrays = dict[str, Any]
Function = Callable[[Arrays], Any]


def stripe(implementation: str, case: Case, loops: int) -> Runnable:
    """Any op as the kernels suite times it: a program has several runs of it.

    Each has an array of its own, or XLA would run one of them; where the result is the residual
    stream, the next one goes on with it, in place where it can.
    """
    needs_gpu(implementation)
    static, arrays = split(case)
    function = bind(case, static, implementation)
    out, peak, copies = jax.jit(function)(arrays), JAX.peak(), min(loops, COPIES)
    name = "x" if "x" in arrays else "qkv"
    first = arrays.pop(name)

    def chained(first: Any, rest: Arrays) -> Any:
        for _ in range(copies):
            first = function({**rest, name: first})
        return first

    def several(first: Any, rest: Arrays) -> Any:
        return [function({**rest, name: x}) for x in first]

    output, notes = compared(case, out, arrays), {"device": JAX.name, "copies": copies}
    if case.changes_x:
        launch = _donating(chained, first, arrays)
    else:
        firsts = [jnp.copy(first) for _ in range(copies)]
        program = jax.jit(several).lower(firsts, arrays).compile()
        launch = functools.partial(program, firsts, arrays)
    return Runnable(JAX, launch, output, notes, copies, peak)


window = mlp = stripe


def tuned(
    implementation: str, case: Case, config: dict[str, Any] | None
) -> tuple[Runnable, Runnable | None]:
    """A case as a loop inside one program, so that no launch waits for the host.

    Returns:
        The whole function; and of attention its kernel alone, without the position bias.
    """
    needs_gpu(implementation)
    static, arrays = split(case)
    function = bind(case, static, implementation, config)
    program = jax.jit(function)
    out = program(arrays)
    if case.changes_x:
        check_unrouted(case, out, arrays)
    for _ in range(REPEATS if case.op == "mlp" and on_gpu() else 0):
        if not bool((program(arrays) == out).all()):
            raise ValueError("wrong: repeats differ")
    whole = _loop(function, arrays, case, compared(case, out, arrays))
    if implementation != "mosaic_gpu" or case.op not in ("stripe", "window"):
        return whole, None
    return whole, _loop(*prepare(case, static | arrays, config), case, whole.output)


def _loop(step: Callable[[Any], Any], arrays: Any, case: Case, output: np.ndarray) -> Runnable:
    loops = (40 if case.batch > 1 else 150) if on_gpu() else 2
    if case.changes_x:
        arrays = dict(arrays)
        state = arrays.pop("x")
    else:
        state = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(step, arrays))

    def many(state: Any, arrays: Any) -> Any:
        def again(_: Any, carry: tuple[Any, Any]) -> tuple[Any, Any]:
            # The barrier ties the arrays to the count, so that no run is moved out of the loop.
            own, count = lax.optimization_barrier((arrays, carry[0]))
            return count + 1, step({**own, "x": carry[1]} if case.changes_x else own)

        return lax.fori_loop(0, loops, again, (0, state))[1]

    return Runnable(JAX, _donating(many, state, arrays), output, {"device": JAX.name}, loops)


def _donating(function: Callable[[Any, Any], Any], state: Any, rest: Any) -> Callable[[], Any]:
    """Launches that go on with the result of the last one, in its place."""
    state = jax.tree.map(jnp.copy, state)
    program = jax.jit(function, donate_argnums=0).lower(state, rest).compile()

    def launch() -> Any:
        nonlocal state
        state = program(state, rest)
        return state

    return launch


def split(case: Case, *, reference: bool = False) -> tuple[Arrays, Arrays]:
    """What is static of a case's inputs, as numpy, and the others as arrays of its dtype.

    A reference has the last image's, in float32.
    """
    dtype = jnp.dtype("float32" if reference else case.dtype)
    host = case.arrays()
    static = {name: host.pop(name) for name in case.static_names if name in host}
    if case.op == "mlp" and case.density == 1:
        del host["index"]
    if reference:
        host |= {name: host[name][-1:] for name in case.by_image if name in host}
    of_dtype = {name: dtype if x.dtype == np.float32 else None for name, x in host.items()}
    if case.stream and not reference:
        of_dtype["x"] = jnp.dtype(case.stream)
    return static, {name: jnp.asarray(x, of_dtype[name]) for name, x in host.items()}


def bind(
    case: Case, static: Arrays, implementation: str, config: dict[str, Any] | None = None
) -> Function:
    """A case's function of its arrays."""

    def function(arrays: Arrays) -> Any:
        if implementation == "xla":
            return _by_xla(case, static | arrays)
        if case.op == "stripe":  # some images at a time
            _, given, options = _call(case, static | arrays, config)
            return stripe_attention.attend_by_groups(*given, **options)
        launch, operands = prepare(case, static | arrays, config)
        return launch(operands)[: len(arrays["a"])] if case.op == "norm" else launch(operands)

    return function


def prepare(case: Case, a: Arrays, config: dict[str, Any] | None = None) -> tuple[Function, Any]:
    """A kernel's launch by its operands, and these."""
    module, given, options = _call(case, a, config)
    statics, operands = module.prepare(*given, **options)
    return lambda operands: module.launch(statics, *operands), operands


def _call(
    case: Case, a: Arrays, config: dict[str, Any] | None = None
) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """A kernel's module, and what its `prepare` takes, by place and by name."""
    op, _, epilogue = case.op.partition("-")
    chosen: Arrays = dict(config or {})
    if config and op in CONFIGS:
        chosen = {"config": CONFIGS[op](**config)}
    tables: tuple[Any, ...] = tuple(a.get(f"rel_pos_{name}") for name in "hw")
    if op == "stripe":
        own = {"layout": case.layout, "block_order": a.get("block_order")}
        return stripe_attention, (a["qkv"], *tables, a.get("sequence")), own | chosen
    if op == "window":
        own = {"layout": case.layout, "order": a.get("order"), "window_size": case.window_size}
        return window_attention, (a["qkv"], *tables), own | chosen
    if op == "bias":  # in whole chunks of key coordinates
        padded = [jnp.pad(x, ((0, 0), (0, -x.shape[1] % 16), (0, 0))) for x in tables]
        return relative_position, (a["qkv"], *padded), {}
    if op == "mlp":
        weights = MLPWeights(*(a[name] for name in MLPWeights._fields[:6]))
        return routed_mlp, (a["x"], a.get("index"), weights), {}
    rows, options = a.get("rows"), {"num_rows": case.batch * case.num_routed} | chosen
    if op == "norm":
        given = a["x"], a["norm_scale"], a["norm_bias"], rows
        return gather_norm_kernel, given, options | {"dtype": a["norm_scale"].dtype}
    given = a["a"], a[f"kernel{op[-1]}"], a[f"bias{op[-1]}"]
    epilogue: Any = epilogue or ("gelu" if op == "lin1" else "add")
    if "config" not in options:
        (m, k), n = given[0].shape, given[1].shape[1]
        options["config"] = tuning.fitting_matmul(epilogue, m, n, k, given[0].dtype)
    target = (rows, a["x"]) if case.changes_x else ()
    return matmul_kernel, (*given, *target), options | {"epilogue": epilogue}


def _by_xla(case: Case, a: Arrays) -> Any:
    if not case.is_rows:
        _, given, options = _call(case, a)
        if case.op == "stripe":
            return stripe_attention.stripe_attention(*given, **options, implementation="xla")
        if case.op == "window":
            return window_attention.window_attention(*given, **options, implementation="xla")
        if case.op == "bias":
            return relative_position.xla_relative_position(*given)
        x, index, weights = given
        if index is None:
            return mlp_reference.mlp(x, weights, epsilon=EPSILON)
        return mlp_reference.routed_mlp(x, index, weights, epsilon=EPSILON)
    op, _, epilogue = case.op.partition("-")
    rows, x = a.get("rows"), a["x"]
    if op == "norm":
        x = x if rows is None else x[rows]
        scale, bias = a["norm_scale"], a["norm_bias"]
        return reference.layer_norm(x, scale, bias, EPSILON, scale.dtype)
    out = jnp.matmul(
        a["a"], a[f"kernel{op[-1]}"], precision=reference.matmul_precision(a["a"].dtype)
    )
    if epilogue == "none":
        return out
    out = out.astype(jnp.float32) + a[f"bias{op[-1]}"]
    if not case.changes_x:
        out = out if epilogue == "bias" else jax.nn.gelu(out, approximate=False)
        return out.astype(a["a"].dtype)
    count = case.batch * case.num_routed
    update = out[:count].astype(x.dtype)
    return x + update if rows is None else x.at[rows[:count]].add(update, unique_indices=True)


def reference_output(case: Case) -> np.ndarray:
    """What a case is compared with: the same in float32 by XLA."""
    static, arrays = split(case, reference=True)
    return compared(case, jax.jit(bind(case, static, "xla"))(arrays), arrays)


def compared(case: Case, out: Any, arrays: Arrays) -> np.ndarray:
    """What is compared of a result: the last image, or of rows of all images some."""
    if not case.is_rows:
        leaves = [x[-1].astype(jnp.float32) for x in jax.tree.leaves(out)]
        return np.asarray(jnp.concatenate(leaves, axis=-1))
    picked = np.linspace(0, case.batch * case.num_routed - 1, SAMPLE).astype(int)
    picked = arrays["rows"][picked] if case.changes_x and "rows" in arrays else picked
    return np.asarray(out[picked], np.float32)


def check_unrouted(case: Case, out: jax.Array, arrays: Arrays) -> None:
    """Raise ValueError if a token that is not routed has changed by one bit."""
    tokens, rows = case.tokens, arrays.get("rows")
    if case.density == 1:
        return
    if rows is None:
        rows = arrays["index"] + jnp.arange(case.batch)[:, None] * tokens
    others = np.delete(np.arange(case.batch * tokens), np.asarray(rows).ravel())
    width = out.shape[-1]
    before, after = (np.asarray(x.reshape(-1, width)[others]) for x in (arrays["x"], out))
    if before.tobytes() != after.tobytes():
        raise ValueError("wrong: a token that is not routed has changed")
