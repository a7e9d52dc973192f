"""Every kernel once, on shapes that are small enough for NVIDIA's compute-sanitizer.

    compute-sanitizer --tool memcheck python -m benchmarks sanitize
    compute-sanitizer --tool racecheck python -m benchmarks sanitize --only no-bias

Prints the error of each beside float32 XLA on the CPU; the sanitizer says how many errors or
hazards it saw.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from typer import Option

from benchmarks.cases.kernel_cases import OPS, PARTS, Case, listed
from benchmarks.run.jobs import relative_error

MAX_ERROR = 2e-2  # relative Frobenius, of bfloat16
_USUAL: dict[str, Any] = dict(model="vit_t", batch=1, density=1.0)


def cases(only: Sequence[str] = ()) -> list[Case]:
    """Those whose labels have the words."""
    found = [case for op in (*OPS, *PARTS) for case in listed("sanitize", op, **_USUAL)]
    return [case for case in found if set(only) <= set(str(case).split())]


def error(case: Case, implementation: str = "mosaic_gpu") -> float:
    """That of a case's result beside float32."""
    import jax

    from benchmarks.peers import jax_kernels

    static, arrays = jax_kernels.split(case)
    out = jax.jit(jax_kernels.bind(case, static, implementation))(arrays)
    with jax.default_device(jax.devices("cpu")[0]):  # a sanitizer stays with the kernels
        want = jax_kernels.reference_output(case)
    return relative_error(jax_kernels.compared(case, out, arrays), want)


def sanitize(
    only: Annotated[Sequence[str], Option(help="A word of the labels; may be repeated.")] = (),
) -> int:
    """Every kernel once, for NVIDIA's compute-sanitizer to watch: memcheck or racecheck."""
    from pallas_kernels import implementation

    if problem := implementation.device_problem():
        raise ValueError(problem)
    wrong = False
    for case in cases(only):
        found = error(case)
        wrong |= not found <= MAX_ERROR
        print(f"{case}: error {found:.1e}", flush=True)
    return int(wrong)
