"""The shapes of the kernels suite and of tuning, and the same inputs for every framework."""

from __future__ import annotations

import dataclasses
from typing import Any

import ml_dtypes
import numpy as np

from benchmarks.cases import shapes
from pallas_kernels.block_layout import BlockLayout

OPS = ("stripe", "window", "mlp")
PARTS = ("norm", "lin1", "lin1-bias", "lin1-none", "lin2", "lin2-none", "bias")
INPUT = "standard normal; tables and kernels scaled by 1/sqrt(inputs)"
_DTYPES = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16, "float32": np.float32}
_SHARE = {"stripe": 1.0, "window": 1.0, "mlp": 1.0, "lin1": 0.5, "lin2": 0.5}  # of the products


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One function at a model's shape.

    Attributes:
        op: `stripe` (global attention), `window` (windowed attention) or `mlp` (its LayerNorm and
            residual included). Of `PARTS`, with rows of all images: `norm` (LayerNorm of the routed
            rows), `lin1` (product, bias, GELU), `lin2` (product, bias, residual), what is left of
            these with an epilogue of less, and the query side of attention's position `bias`.
        model: Whose widths and grid.
        batch: Images.
        density: 1 is dense.
        order: Of sparse global attention: `tiles` (static stripes), `blocks` (those, ranked by
            image), `groups` (ranked by image) or `heads` (by image and head). Of a sparse window:
            `static` (the same for all), `heads` (by window and head), else by window.
        dtype: Of inputs and output.
        grid: Tokens along a side of the map; None is the model's.
    """

    op: str
    model: str
    batch: int
    density: float
    order: str | None = None
    dtype: str = "bfloat16"
    grid: int | None = None

    def __post_init__(self) -> None:
        if self.op not in (*OPS, *PARTS):
            raise ValueError(f"op must be one of {', '.join((*OPS, *PARTS))}; got {self.op!r}")

    def __str__(self) -> str:
        grid = None if self.grid is None else f"S{self.grid}"
        dtype = None if self.dtype == "bfloat16" else self.dtype
        parts = self.op, self.model, f"B{self.batch}", f"r{self.density}", self.order, grid, dtype
        return " ".join(part for part in parts if part)

    @property
    def encoder(self) -> Any:
        """The model's image encoder."""
        return shapes.model_config(self.model).image_encoder

    @property
    def side(self) -> int:
        """Tokens along a side of the map."""
        return self.grid or self.encoder.grid_size

    @property
    def window_size(self) -> int:
        """Tokens along a side of a window."""
        return self.encoder.window_size

    @property
    def num_routed(self) -> int:
        """Tokens an image that the MLP runs on."""
        return max(1, round(self.density * self.side**2))

    @property
    def is_rows(self) -> bool:
        """Whether it is a part of the MLP, on rows of all images."""
        return self.op in PARTS and self.op != "bias"

    @property
    def changes_x(self) -> bool:
        """Whether the result is the residual stream, in the place of x."""
        return self.op in ("mlp", "lin2")

    @property
    def layout(self) -> BlockLayout:
        """The block layout of attention."""
        if self.op == "window":
            return BlockLayout.bar(self.window_size**2, self.density)
        return BlockLayout.a_shape(self.side**2, self.density)

    @property
    def flops(self) -> float:
        """Useful floating point operations: the products, without the position bias."""
        encoder, layout = self.encoder, self.layout
        share = 4.0 * self.batch * encoder.embed_dim * _SHARE.get(self.op.split("-")[0], 0.0)
        if self.op == "window":
            return share * self.side**2 * layout.bar_len
        if self.op == "stripe":
            return share * float(layout.block_mask.sum()) * layout.block_q * layout.block_kv
        return share * self.num_routed * encoder.mlp_dim

    @property
    def static_names(self) -> tuple[str, ...]:
        """The arrays that a program knows when it is traced."""
        static = {"stripe": ("tiles", "blocks"), "window": ("static",)}
        return ("sequence", "order") if self.order in static.get(self.op, ()) else ()

    @property
    def by_image(self) -> tuple[str, ...]:
        """The arrays whose first axis is the image's."""
        found = ("qkv", "x", "index", "sequence", "order", "block_order")
        return () if self.is_rows else tuple(n for n in found if n not in self.static_names)

    def arrays(self) -> dict[str, np.ndarray]:
        """Inputs: float32 that `dtype` holds exactly, and int32 indices."""
        rng = np.random.default_rng(0)
        encoder, side, window = self.encoder, self.side, self.window_size
        d, hidden, head_dim = encoder.embed_dim, encoder.mlp_dim, encoder.head_dim

        def normal(*shape: int, scale: float = 1.0, offset: float = 0.0) -> np.ndarray:
            draw = rng.standard_normal(shape, np.float32)
            draw = draw * np.float32(scale) + np.float32(offset)
            return draw.astype(_DTYPES[self.dtype]).astype(np.float32)

        def ranks(*shape: int) -> np.ndarray:
            return rng.random(shape).argsort(-1).astype(np.int32)

        if self.op == "mlp" or self.is_rows:
            found = dict(
                x=normal(self.batch, side**2, d),
                index=np.sort(ranks(self.batch, side**2)[:, : self.num_routed]),
                norm_scale=normal(d, scale=0.1, offset=1.0),
                norm_bias=normal(d, scale=0.1),
                kernel1=normal(d, hidden, scale=d**-0.5),
                bias1=normal(hidden, scale=0.1),
                kernel2=normal(hidden, d, scale=hidden**-0.5),
                bias2=normal(d, scale=0.1),
            )
            if self.is_rows:
                found["x"] = found["x"].reshape(-1, d)
                first = np.arange(self.batch, dtype=np.int32)[:, None] * side**2
                rows = (found.pop("index") + first).ravel()
                if self.density < 1:  # padded to whole tiles of every product
                    found["rows"] = np.pad(rows, (0, -len(rows) % 256), mode="edge")
                width = hidden if self.op.startswith("lin2") else d
                found["a"] = normal(len(rows) + -len(rows) % 256, width, scale=0.5)
            return found
        keys = window if self.op == "window" else side
        shape = (self.batch, side, side, 3, encoder.num_heads, head_dim)
        tables = [normal(side, keys, head_dim, scale=head_dim**-0.5) for _ in range(2)]
        found = dict(qkv=normal(*shape), rel_pos_h=tables[0], rel_pos_w=tables[1])
        if self.density == 1 or self.op == "bias":
            return found
        heads = (encoder.num_heads,) if self.order == "heads" else ()
        if self.op == "window":
            lead = () if self.order == "static" else (self.batch, (-(-side // window)) ** 2, *heads)
            return found | {"order": ranks(*lead, window**2)}
        from sparsesam_jax.sparsity.orders import GROUP, curve_order

        groups = curve_order("morton", side, side).reshape(-1, GROUP)
        if self.order in ("tiles", "blocks"):
            found["sequence"] = np.ascontiguousarray(groups.T.ravel())
            if self.order == "blocks":
                found["block_order"] = ranks(self.batch, self.layout.num_kv_blocks)
            return found
        ranked = groups[ranks(self.batch, *heads, len(groups))].swapaxes(-1, -2)
        return found | {"sequence": np.ascontiguousarray(ranked.reshape(*ranked.shape[:-2], -1))}
