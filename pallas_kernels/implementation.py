"""The one rule for `implementation`: which program runs an attention function.

- `"xla"` is plain jax.numpy and runs everywhere. Its attention goes through cuDNN where the default
  device is an NVIDIA GPU of compute capability 8.0 or higher and the dtype has 16 bits
  (`pallas_kernels.cudnn_attention`).
- `"mosaic_gpu"` is the Pallas Mosaic GPU kernel. It runs on jax >= 0.11 (earlier versions lack
  parts of Mosaic GPU that the kernels use) on a GPU of compute capability 9.x (Hopper: the kernels
  are built on wgmma), for the dtypes, head dims, grids and orders that each kernel lists. Anything
  else is an error that says what is in the way.
- `"auto"` is the kernel wherever it runs, else XLA.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, Literal, get_args

import jax

from pallas_kernels.choices import Implementation

Resolved = Literal["xla", "mosaic_gpu"]

JAX_SUPPORTS_MOSAIC_GPU = jax.__version_info__ >= (0, 11, 0)


def device_problem() -> str | None:
    """Why the default device cannot run a Mosaic GPU kernel, or None where it can."""
    if not JAX_SUPPORTS_MOSAIC_GPU:
        return f"needs jax >= 0.11, got jax {jax.__version__}"
    device = jax.devices()[0]
    capability = getattr(device, "compute_capability", None)
    if device.platform != "gpu" or not str(capability).startswith("9."):
        got = f"{device.device_kind} on the {device.platform} backend"
        return f"needs a GPU of compute capability 9.x as the default device, got {got}"
    return None


def resolve(
    implementation: Implementation, *, function: str, problems: Sequence[str] = ()
) -> Resolved:
    """The program that `implementation` means for one call.

    Args:
        implementation: `"auto"`, `"xla"` or `"mosaic_gpu"`.
        function: The public function that asks, for the error message.
        problems: What the kernel does not support about this call, each as "argument must be
            ..., got ..."; empty if it supports the call.

    Returns:
        `"xla"` or `"mosaic_gpu"`.

    Raises:
        ValueError: `implementation` is none of the three, or is `"mosaic_gpu"` where the kernel
            cannot run: the message lists all that is in the way.
    """
    if implementation not in get_args(Implementation):
        expected = ", ".join(get_args(Implementation))
        raise ValueError(f"implementation must be one of {expected}; got {implementation!r}")
    if implementation == "xla":
        return "xla"
    device = device_problem()
    all_problems = [*([device] if device else []), *problems]
    if not all_problems:
        return "mosaic_gpu"
    if implementation == "auto":
        return "xla"
    raise ValueError(
        f'implementation="mosaic_gpu" is unsupported for {function}: {"; ".join(all_problems)}'
    )


# Around a kernel's operands and not its launch: a reference, which a launch that works in place
# creates, cannot live in a function with a rule of its own.
@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def undifferentiable(function: str, operands: Any) -> Any:
    """The operands of a kernel, with an error in the place of a gradient.

    Args:
        function: What the user called, for the error message.
        operands: Arrays, in any structure.

    Raises:
        NotImplementedError: When it is differentiated.
    """
    return operands


@undifferentiable.defjvp
def _no_gradient(function: str, *_: Any) -> Any:
    raise NotImplementedError(
        f'{function} with implementation="mosaic_gpu" has no gradient; '
        'use implementation="xla", which is differentiable'
    )
