"""The shapes of the kernels suite, and the same inputs for every framework."""

from __future__ import annotations

import dataclasses
from typing import Any

import ml_dtypes
import numpy as np

from benchmarks.cases import shapes
from pallas_kernels.block_layout import BlockLayout
from sparsesam_jax.sparsity.orders import GROUP, curve_order

OPS = ("stripe", "window", "mlp")
INPUT = "standard normal; tables and kernels scaled by 1/sqrt(inputs)"
_DTYPES = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16, "float32": np.float32}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One function at a model's shape.

    Attributes:
        op: `stripe` (global attention), `window` (windowed attention) or `mlp` (its LayerNorm and
            residual included).
        model: Whose widths and grid.
        batch: Images.
        density: 1 is dense.
        order: Of sparse global attention: `tiles` (static stripes) or `groups` (ranked by image).
        dtype: Of inputs and output.
    """

    op: str
    model: str
    batch: int
    density: float
    order: str | None = None
    dtype: str = "bfloat16"

    def __str__(self) -> str:
        order = f" {self.order}" if self.order else ""
        return f"{self.op} {self.model} B{self.batch} r{self.density}{order}"

    @property
    def side(self) -> int:
        """Tokens along a side of the map."""
        return self._encoder.grid_size

    @property
    def window_size(self) -> int:
        """Tokens along a side of a window."""
        return self._encoder.window_size

    @property
    def num_routed(self) -> int:
        """Tokens an image that the MLP runs on."""
        return max(1, round(self.density * self.side**2))

    @property
    def layout(self) -> BlockLayout:
        """The block layout of attention."""
        if self.op == "window":
            return BlockLayout.bar(self.window_size**2, self.density)
        return BlockLayout.a_shape(self.side**2, self.density)

    @property
    def flops(self) -> float:
        """Useful floating point operations: both products, without the position bias."""
        encoder = self._encoder
        if self.op == "mlp":
            return 4.0 * self.batch * self.num_routed * encoder.embed_dim * encoder.mlp_dim
        layout = self.layout
        if self.op == "window":
            pairs = self.side**2 * layout.bar_len
        else:
            pairs = layout.block_mask.sum() * layout.block_q * layout.block_kv
        return 4.0 * self.batch * encoder.embed_dim * float(pairs)

    @property
    def _encoder(self) -> Any:
        return shapes.model_config(self.model).image_encoder

    def arrays(self) -> dict[str, np.ndarray]:
        """Inputs: float32 that `dtype` holds exactly, and int32 indices."""
        rng = np.random.default_rng(0)
        encoder, side, window = self._encoder, self.side, self.window_size
        d, hidden, head_dim = encoder.embed_dim, encoder.mlp_dim, encoder.head_dim

        def normal(*shape: int, scale: float = 1.0, offset: float = 0.0) -> np.ndarray:
            draw = rng.standard_normal(shape, np.float32)
            draw = draw * np.float32(scale) + np.float32(offset)
            return draw.astype(_DTYPES[self.dtype]).astype(np.float32)

        if self.op == "mlp":
            draws = rng.random((self.batch, side**2)).argsort(1)[:, : self.num_routed]
            return dict(
                x=normal(self.batch, side**2, d),
                index=np.sort(draws, axis=1).astype(np.int32),
                norm_scale=normal(d, scale=0.1, offset=1.0),
                norm_bias=normal(d, scale=0.1),
                kernel1=normal(d, hidden, scale=d**-0.5),
                bias1=normal(hidden, scale=0.1),
                kernel2=normal(hidden, d, scale=hidden**-0.5),
                bias2=normal(d, scale=0.1),
            )
        keys = window if self.op == "window" else side
        shape = (self.batch, side, side, 3, encoder.num_heads, head_dim)
        tables = [normal(side, keys, head_dim, scale=head_dim**-0.5) for _ in range(2)]
        found = dict(qkv=normal(*shape), rel_pos_h=tables[0], rel_pos_w=tables[1])
        if self.density == 1:
            return found
        if self.op == "window":
            windows = (-(-side // window)) ** 2
            order = rng.random((self.batch, windows, window**2)).argsort(-1)
            return found | {"order": order.astype(np.int32)}
        groups = curve_order("morton", side, side).reshape(-1, GROUP)
        if self.order == "tiles":
            return found | {"sequence": np.ascontiguousarray(groups.T.ravel())}
        ranks = rng.random((self.batch, len(groups))).argsort(-1)
        ranked = groups[ranks].swapaxes(1, 2).reshape(self.batch, -1)
        return found | {"sequence": np.ascontiguousarray(ranked)}


def check(case: Case) -> None:
    """Raise ValueError unless the case can be measured."""
    shapes.model_config(case.model)
    if case.op not in OPS:
        raise ValueError(f"op must be one of {', '.join(OPS)}; got {case.op!r}")
    if case.batch < 1:
        raise ValueError(f"batch must be positive, got {case.batch}")
    if not 0 < case.density <= 1:
        raise ValueError(f"density must lie in (0, 1], got {case.density}")
