"""A kernel's shape, the same inputs for every framework; lists of them in `kernel_cases.toml`."""

from __future__ import annotations

import dataclasses
import tomllib
from pathlib import Path
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
        grid: Tokens down the map; None is the model's.
        width: Tokens across the map; None is as many.
        heads: None is the model's; the widths follow.
        stream: Dtype of the residual stream; None is that of the rest.
        rel_pos: Whether attention has a position bias.
    """

    op: str
    model: str
    batch: int
    density: float
    order: str | None = None
    dtype: str = "bfloat16"
    grid: int | None = None
    width: int | None = None
    heads: int | None = None
    stream: str | None = None
    rel_pos: bool = True

    def __post_init__(self) -> None:
        if self.op not in (*OPS, *PARTS):
            raise ValueError(f"op must be one of {', '.join((*OPS, *PARTS))}; got {self.op!r}")

    def __str__(self) -> str:
        width = f"x{self.width}" if self.width else ""
        parts = [self.op, self.model, f"B{self.batch}", f"r{self.density}", self.order]
        parts.append(f"S{self.grid}{width}" if self.grid else None)
        parts.append(f"H{self.heads}" if self.heads else None)
        parts += [None if self.dtype == "bfloat16" else self.dtype, self.stream and "stream"]
        parts += [self.stream, None if self.rel_pos else "no-bias"]
        return " ".join(part for part in parts if part)

    @property
    def encoder(self) -> Any:
        """The model's image encoder."""
        config = shapes.model_config(self.model).image_encoder
        heads = self.heads or config.num_heads
        d = heads * config.head_dim
        return dataclasses.replace(config, num_heads=heads, embed_dim=d)

    @property
    def sides(self) -> tuple[int, int]:
        """Tokens down and across the map."""
        height = self.grid or self.encoder.grid_size
        return height, self.width or height

    @property
    def tokens(self) -> int:
        """Tokens of an image."""
        return self.sides[0] * self.sides[1]

    @property
    def window_size(self) -> int:
        """Tokens along a side of a window."""
        return self.encoder.window_size

    @property
    def num_routed(self) -> int:
        """Tokens an image that the MLP runs on."""
        return max(1, round(self.density * self.tokens))

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
        return BlockLayout.a_shape(self.tokens, self.density)

    @property
    def flops(self) -> float:
        """Useful floating point operations: the products, without the position bias."""
        encoder, layout = self.encoder, self.layout
        share = 4.0 * self.batch * encoder.embed_dim * _SHARE.get(self.op.split("-")[0], 0.0)
        if self.op == "window":
            return share * self.tokens * layout.bar_len
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
        encoder, (height, width), window = self.encoder, self.sides, self.window_size
        d, hidden, head_dim = encoder.embed_dim, encoder.mlp_dim, encoder.head_dim

        def normal(
            *shape: int, scale: float = 1.0, offset: float = 0.0, dtype: str = self.dtype
        ) -> np.ndarray:
            draw = rng.standard_normal(shape, np.float32)
            draw = draw * np.float32(scale) + np.float32(offset)
            return draw.astype(_DTYPES[dtype]).astype(np.float32)

        def ranks(*shape: int) -> np.ndarray:
            return rng.random(shape).argsort(-1).astype(np.int32)

        if self.op == "mlp" or self.is_rows:
            found = dict(
                x=normal(self.batch, self.tokens, d, dtype=self.stream or self.dtype),
                index=np.sort(ranks(self.batch, self.tokens)[:, : self.num_routed]),
                norm_scale=normal(d, scale=0.1, offset=1.0),
                norm_bias=normal(d, scale=0.1),
                kernel1=normal(d, hidden, scale=d**-0.5),
                bias1=normal(hidden, scale=0.1),
                kernel2=normal(hidden, d, scale=hidden**-0.5),
                bias2=normal(d, scale=0.1),
            )
            if self.is_rows:
                found["x"] = found["x"].reshape(-1, d)
                first = np.arange(self.batch, dtype=np.int32)[:, None] * self.tokens
                rows = (found.pop("index") + first).ravel()
                padding = -len(rows) % 256  # to whole tiles of every product
                if self.density < 1 or padding:
                    found["rows"] = np.pad(rows, (0, padding), mode="edge")
                width = hidden if self.op.startswith("lin2") else d
                found["a"] = normal(len(rows) + padding, width, scale=0.5)
            return found
        found = dict(qkv=normal(self.batch, height, width, 3, encoder.num_heads, head_dim))
        for name, side in zip("hw", (height, width), strict=True) if self.rel_pos else ():
            keys = window if self.op == "window" else side
            found[f"rel_pos_{name}"] = normal(side, keys, head_dim, scale=head_dim**-0.5)
        if (self.density == 1 and self.order is None) or self.op == "bias":
            return found
        heads = (encoder.num_heads,) if self.order == "heads" else ()
        if self.op == "window":
            count = -(-height // window) * -(-width // window)
            lead = () if self.order == "static" else (self.batch, count, *heads)
            return found | {"order": ranks(*lead, window**2)}
        from sparsesam_jax.sparsity.orders import GROUP, curve_order

        groups = curve_order("morton", height, width).reshape(-1, GROUP)
        if self.order in ("tiles", "blocks"):
            found["sequence"] = np.ascontiguousarray(groups.T.ravel())
            if self.order == "blocks":
                found["block_order"] = ranks(self.batch, self.layout.num_kv_blocks)
            return found
        ranked = groups[ranks(self.batch, *heads, len(groups))].swapaxes(-1, -2)
        return found | {"sequence": np.ascontiguousarray(ranked.reshape(*ranked.shape[:-2], -1))}


def listed(suite: str, op: str, **given: Any) -> list[Case]:
    """The cases of an op in the list of a suite, with what is given in place of its defaults."""
    lists = _LISTS[suite]
    return [Case(op=op, **{**given, **own}) for own in lists.get(op, lists.get("rows", []))]


_LISTS = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))
