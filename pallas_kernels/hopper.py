"""What the kernels know of a Hopper GPU (compute capability 9.x), each fact once.

The facts are the card's (multiprocessors, registers, shared memory) and, an entry a dtype, how its
tensor core and its tensor memory accelerator (TMA) take operands. wgmma multiplies 64 rows at a
time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike
from jaxtyping import Array

from pallas_kernels import float8

MULTIPROCESSORS = 132  # of an H100 or H200 (SXM)
WGMMA_ROWS = 64  # of one product of a warpgroup on the tensor core
# A multiprocessor has 512 registers for one thread of every warpgroup. By the number of warpgroups
# that compute: registers of a thread of theirs, and of the one that copies for them.
REGISTERS = {2: (232, 40), 3: (160, 32)}

_SWIZZLE_BYTES = 128  # of a row in the TMA's widest swizzle
_STEP_BYTES = 32  # of a row that one step of the tensor core contracts, and the narrowest swizzle
_MULTIPROCESSOR_SMEM = 228 * 1024
_SYSTEM_SMEM = 1024  # that the system keeps of every program
_SMEM_ALIGNMENT = 1024  # Mosaic begins every buffer at a multiple of this
_REDUCTION_SMEM = 2048  # that Mosaic adds where warps of a warpgroup reduce a row together
_BARRIER_SMEM = 8


class Operand(NamedTuple):
    """How the tensor core and the TMA take operands of one dtype.

    Attributes:
        itemsize: Bytes of an element.
        k_major: Whether both operands must be contiguous along the contraction. Else the tensor
            core takes the right one, [K, N], either way.
        accumulator: Dtype of a product's sums.
    """

    itemsize: int
    k_major: bool
    accumulator: Any

    @property
    def columns(self) -> int:
        """Columns of a tile in shared memory: a row is the TMA's widest swizzle."""
        return _SWIZZLE_BYTES // self.itemsize

    @property
    def step(self) -> int:
        """What one step of the tensor core contracts: a row is the TMA's narrowest swizzle."""
        return _STEP_BYTES // self.itemsize


OPERANDS = {
    jnp.dtype(jnp.bfloat16): Operand(itemsize=2, k_major=False, accumulator=jnp.float32),
    jnp.dtype(jnp.float16): Operand(itemsize=2, k_major=False, accumulator=jnp.float32),
    float8.DTYPE: Operand(itemsize=1, k_major=True, accumulator=jnp.float32),
}
# What all kernels take: attention reads values as [keys, D], rows of N.
KERNEL_DTYPES = tuple(dtype for dtype, operand in OPERANDS.items() if not operand.k_major)
VECTOR_DTYPES = (jnp.dtype(jnp.float32), *KERNEL_DTYPES)  # of biases and scales


def dtype_problems(expected: Sequence[Any], **dtypes: Any) -> list[str]:
    """A clause for `implementation.resolve` about each argument whose dtype is not expected."""
    *others, last = (dtype.name for dtype in expected)
    names = f"{', '.join(others)} or {last}"
    wrong = {name: dtype for name, dtype in dtypes.items() if dtype not in expected}
    return [f"{name} must be {names}, got {dtype}" for name, dtype in wrong.items()]


def buffer(dtype: DTypeLike, *shape: int) -> Any:
    """Shared memory of an operand of wgmma, in tiles of 8 rows that are one swizzle wide.

    Rows narrower than any swizzle, which a result in 8 bits may have, are not in tiles.
    """
    operand = OPERANDS[jnp.dtype(dtype)]
    columns = min(shape[-1], operand.columns)
    if columns < operand.step:
        return plgpu.SMEM(shape, dtype)
    tiling = plgpu.TilingTransform((8, columns))  # pyright: ignore[reportAbstractUsage]
    swizzle = plgpu.SwizzleTransform(operand.itemsize * columns)  # pyright: ignore[reportAbstractUsage]
    return plgpu.SMEM(shape, dtype, transforms=(tiling, swizzle))


def rounded(x: Array, dtype: DTypeLike, *, interpret: Any) -> Array:
    """Registers in the dtype of a result; 8 bits saturate, as the hardware's conversion does."""
    if interpret and dtype == float8.DTYPE:
        return float8.saturated(x)
    return x.astype(dtype)


def accumulator(dtype: DTypeLike, rows: int, columns: int) -> Any:
    """Registers for the sums of a product of two operands of this dtype."""
    return plgpu.WGMMAAccumulatorRef((rows, columns), OPERANDS[jnp.dtype(dtype)].accumulator)


def smem_limit(programs: int = 1) -> int:
    """Bytes of shared memory of each of so many programs that share a multiprocessor."""
    return _MULTIPROCESSOR_SMEM // programs - _SYSTEM_SMEM


def smem_bytes(scratch: Any, *, reduces: bool) -> int:
    """Bytes of shared memory that a program takes, as Mosaic lays its scratch out.

    Args:
        scratch: What the kernel declares as `scratch_types`: buffers and barriers.
        reduces: Whether the kernel takes sums or maxima over an axis.
    """
    total = _REDUCTION_SMEM if reduces else 0
    for leaf in jax.tree.leaves(scratch):
        if isinstance(leaf, plgpu.Barrier | plgpu.ClusterBarrier):
            # pyright reads the constructor's argument; it is kept as a shape.
            total += _BARRIER_SMEM * math.prod(leaf.num_barriers)  # pyright: ignore
        else:
            size = math.prod(leaf.shape) * jnp.dtype(leaf.dtype).itemsize
            total += -(-size // _SMEM_ALIGNMENT) * _SMEM_ALIGNMENT
    return total


def kernel(
    body: Callable[..., None],
    *,
    name: str,
    interpret: Any,
    approx_math: bool = True,
    **options: Any,
) -> Callable[..., Any]:
    """`plgpu.kernel` as all kernels here use it.

    Args:
        body: The kernel.
        name: Of the kernel in profiles.
        interpret: False, or parameters of Mosaic GPU's interpret mode.
        approx_math: Whether exponentials and roots are the hardware's approximations.
        **options: Further arguments of `plgpu.kernel`.
    """
    return plgpu.kernel(
        body,
        kernel_name=name,
        interpret=interpret,
        compiler_params=plgpu.CompilerParams(
            approx_math=approx_math, lowering_semantics=plgpu.LoweringSemantics.Lane
        ),
        **options,
    )
