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
from benchmarks.peers.jax_models import needs_gpu, on_gpu, peak_memory, runnable
from benchmarks.run.timing import Runnable
from pallas_kernels import (
    gather_norm_kernel,
    matmul_kernel,
    mlp_reference,
    reference,
    relative_position,
    routed_mlp,
    stripe_attention,
    tuning,
    window_attention,
)
from pallas_kernels.mlp_weights import MLPWeights

COPIES = 5  # of a function in one program: XLA makes a CUDA graph of five launches or more
SAMPLE = 256  # rows of a part of the MLP that are compared
REPEATS = 20  # of a whole MLP, which must agree to the bit
EPSILON = 1e-6
# Module and configuration of every op.
MODULES: dict[str, tuple[Any, Any]] = {
    "stripe": (stripe_attention, type(tuning.H200.tiles[0])),
    "window": (window_attention, type(tuning.H200.windows[0])),
    "mlp": (routed_mlp, None),
    "norm": (gather_norm_kernel, None),
    "bias": (relative_position, None),
    "lin1": (matmul_kernel, matmul_kernel.Config),
    "lin2": (matmul_kernel, matmul_kernel.Config),
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
    out, peak, copies = jax.jit(function)(arrays), peak_memory(), min(loops, COPIES)
    name = "x" if "x" in arrays else "qkv"
    first = arrays.pop(name)

    def chained(first: Any, rest: Arrays) -> Any:
        for _ in range(copies):
            first = function({**rest, name: first})
        return first

    def several(first: Any, rest: Arrays) -> Any:
        return [function({**rest, name: x}) for x in first]

    output, notes = compared(case, out, arrays), {"copies": copies}
    if case.changes_x:
        launch = _donating(chained, first, arrays)
    else:
        firsts = [jnp.copy(first) for _ in range(copies)]
        program = jax.jit(several).lower(firsts, arrays).compile()
        launch = functools.partial(program, firsts, arrays)
    return runnable(launch, output=output, peak=peak, notes=notes, runs=copies)


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
    statics, operands = prepared(case, static, arrays, config)
    launch = MODULES[case.op][0].launch
    return whole, _loop(lambda operands: launch(statics, *operands), operands, case, whole.output)


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

    return runnable(_donating(many, state, arrays), notes={}, output=output, runs=loops)


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
    return static, {name: jnp.asarray(x, of_dtype[name]) for name, x in host.items()}


def bind(
    case: Case, static: Arrays, implementation: str, config: dict[str, Any] | None = None
) -> Function:
    """A case's function of its arrays."""

    def function(arrays: Arrays) -> Any:
        if implementation == "xla":
            return _by_xla(case, static, arrays)
        if case.op == "stripe":  # some images at a time
            given, options = _arguments(case, static, arrays, config)
            return stripe_attention.attend_by_groups(*given, **options)
        statics, operands = prepare(case, static, arrays, config)
        out = MODULES[case.op.split("-")[0]][0].launch(statics, *operands)
        return out[: len(arrays["a"])] if case.op == "norm" else out

    return function


def prepared(
    case: Case, static: Arrays, arrays: Arrays, config: dict[str, Any] | None
) -> tuple[Any, Any]:
    """A kernel's statics, and its operands as arrays."""
    found: list[Any] = []

    @jax.jit
    def operands(arrays: Arrays) -> Any:
        statics, operands = prepare(case, static, arrays, config)
        found.append(statics)
        return operands

    own = operands(arrays)
    return found[0], own


def prepare(case: Case, static: Arrays, arrays: Arrays, config: dict[str, Any] | None) -> Any:
    """A kernel's statics and operands."""
    given, options = _arguments(case, static, arrays, config)
    return MODULES[case.op.split("-")[0]][0].prepare(*given, **options)


def _arguments(
    case: Case, static: Arrays, arrays: Arrays, config: dict[str, Any] | None
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What `prepare` takes, by place and by name."""
    a = {**static, **arrays}
    op, _, epilogue = case.op.partition("-")
    config_type = MODULES[op][1]
    chosen = {"config": config_type(**config)} if config_type and config else dict(config or {})
    if op == "mlp":
        return (a["x"], a.get("index"), MLPWeights(*(a[n] for n in MLPWeights._fields[:6]))), {}
    if op in ("stripe", "window", "bias"):
        given = tuple(a.pop(name) for name in ("qkv", "rel_pos_h", "rel_pos_w"))
        if op == "bias":  # in whole chunks of key coordinates
            edges = [((0, 0), (0, -x.shape[1] % 16), (0, 0)) for x in given[1:]]
            return (given[0], *map(jnp.pad, given[1:], edges)), {}
        size = {"window_size": case.window_size} if op == "window" else {}
        return given, {"layout": case.layout, **size, **a, **chosen}
    rows, num_rows = a.get("rows"), {"num_rows": case.batch * case.num_routed}
    if op == "norm":
        return (a["x"], a["norm_scale"], a["norm_bias"], rows), num_rows | chosen
    given = a["a"], a[f"kernel{op[-1]}"], a[f"bias{op[-1]}"]
    epilogue: Any = epilogue or ("gelu" if op == "lin1" else "add")
    if "config" not in chosen:
        (m, k), n = given[0].shape, given[1].shape[1]
        chosen["config"] = tuning.fitting_matmul(epilogue, m, n, k, given[0].dtype)
    target = (rows, a["x"]) if case.changes_x else ()
    return (*given, *target), {"epilogue": epilogue, **num_rows, **chosen}


def _by_xla(case: Case, static: Arrays, arrays: Arrays) -> Any:
    given: Any = ()
    own: Any = {"implementation": "xla"}
    if not case.is_rows:
        given, options = _arguments(case, static, arrays, None)
        own |= options
    if case.op == "stripe":
        return stripe_attention.stripe_attention(*given, **own)
    if case.op == "window":
        return window_attention.window_attention(*given, **own)
    if case.op == "bias":
        return relative_position.xla_relative_position(*given)
    if case.op == "mlp":
        x, index, weights = given
        if index is None:
            return mlp_reference.mlp(x, weights, epsilon=EPSILON)
        return mlp_reference.routed_mlp(x, index, weights, epsilon=EPSILON)
    op, _, epilogue = case.op.partition("-")
    rows, x = arrays.get("rows"), arrays["x"]
    if op == "norm":
        x = x if rows is None else x[rows]
        return reference.layer_norm(x, arrays["norm_scale"], arrays["norm_bias"], EPSILON)
    a, b, bias = arrays["a"], arrays[f"kernel{op[-1]}"], arrays[f"bias{op[-1]}"]
    out = jnp.matmul(a, b, precision=reference.matmul_precision(a.dtype))
    if epilogue == "none":
        return out
    out = out.astype(jnp.float32) + bias
    if not case.changes_x:
        out = out if epilogue == "bias" else jax.nn.gelu(out, approximate=False)
        return out.astype(a.dtype)
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
    tokens, rows = case.side**2, arrays.get("rows")
    if case.density == 1:
        return
    if rows is None:
        rows = arrays["index"] + jnp.arange(case.batch)[:, None] * tokens
    others = np.delete(np.arange(case.batch * tokens), np.asarray(rows).ravel())
    width = out.shape[-1]
    before, after = (np.asarray(x.reshape(-1, width)[others]) for x in (arrays["x"], out))
    if before.tobytes() != after.tobytes():
        raise ValueError("wrong: a token that is not routed has changed")
