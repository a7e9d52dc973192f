"""Transformer blocks of an image encoder, as their configuration describes them."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from pallas_kernels.float8 import Float8Rows
from pallas_kernels.implementation import resolve
from pallas_kernels.layer_norm import layer_norm
from pallas_kernels.mlp_weights import MLPWeights
from pallas_kernels.routed_mlp import mlp, routed_mlp
from pallas_kernels.stripe_attention import stripe_attention
from pallas_kernels.window_attention import window_attention
from pallas_kernels.window_kernel import REL
from sparsesam_jax.config import BlockConfig, Grid
from sparsesam_jax.model.float8 import (
    Float8Linear,
    kernel_of,
    product,
    static_scale,
    without_gradient,
)
from sparsesam_jax.model.layers import DTypes, MLPBlock, add, gelu, linear, norm, zeros
from sparsesam_jax.model.program import Graph, Program
from sparsesam_jax.sparsity.plan import BlockPlan, Rankings

LAYER_NORM_EPSILON = 1e-6


class AttentionTables(NamedTuple):
    """What a block's attention derives from its weights alone, in the compute dtype.

    Attributes:
        qkv_bias: The projection's bias of the queries; keys and values have none. None where a
            layer in the place of `qkv` is no plain product.
        proj_bias: The output's bias and, passed through the output's kernel, that of the values;
            None where `proj` is no plain product.
        rel_pos_h: What every query row adds for every key row of the grid, or of the window, which
            is padded as `window_attention` likes it; None without a position bias.
        rel_pos_w: The same for columns.
    """

    qkv_bias: Float[Array, " 3*d"] | None
    proj_bias: Float[Array, " d"] | None
    rel_pos_h: Float[Array, "Gh side D"] | None
    rel_pos_w: Float[Array, "Gw side D"] | None


class Block(nnx.Module):
    """Transformer block: windowed or global attention, then the MLP, both residual."""

    def __init__(self, config: BlockConfig, *, dtypes: DTypes, rngs: nnx.Rngs):
        d = config.embed_dim
        self.config = config
        self.dtypes = dtypes
        self.norm1 = norm(d, LAYER_NORM_EPSILON, dtypes=dtypes, rngs=rngs)
        self.attn = Attention(config, dtypes=dtypes, rngs=rngs)
        self.norm2 = norm(d, LAYER_NORM_EPSILON, dtypes=dtypes, rngs=rngs)
        self.mlp = MLPBlock(d, config.mlp_dim, activation=gelu, dtypes=dtypes, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "B Gh Gw d"],
        plan: BlockPlan,
        rankings: Rankings,
        tables: AttentionTables | None = None,
    ) -> tuple[Float[Array, "B Gh Gw d"], Rankings]:
        """Apply the block.

        Args:
            x: The residual stream.
            plan: What the block does.
            rankings: What the blocks before it have ranked.
            tables: `Attention.tables` of the grid; None makes them.

        Returns:
            The residual stream, and the rankings with those that this block made.
        """
        tables = tables or self.attn.tables(plan.grid, plan.frame)  # once, for both uses
        normed = self._norm("norm1", x, plan, self.attn.qkv)
        attended, rankings = self.attn.attend(
            normed, x, plan, rankings, tables, out_scale=static_scale(self.attn.proj)
        )
        x = self.attn.project(attended, plan, tables, residual=x)
        tokens = x.reshape(x.shape[0], -1, x.shape[-1])
        routed = plan.routed_tokens(rankings)
        if self.replaced_mlp:
            tokens = self._replaced_mlp(tokens, routed, plan)
        else:
            weights = self._mlp_weights()
            if Float8Linear in (type(self.mlp.lin1), type(self.mlp.lin2)):
                tokens, weights = without_gradient((tokens, weights))
            if routed is None:
                tokens = mlp(tokens, weights, **_options(plan))
            else:
                tokens = routed_mlp(tokens, routed, weights, **_options(plan))
        return tokens.reshape(x.shape), rankings

    @property
    def replaced_mlp(self) -> list[str]:
        """Layers of the MLP that are not SAM's own any more, for what the kernels say of them."""
        if type(self.mlp) is not MLPBlock or self.mlp.activation is not gelu:
            return [f"mlp must be SAM's own for the kernel, got {type(self.mlp).__name__}"]
        layers = {"norm2": self.norm2, "mlp.lin1": self.mlp.lin1, "mlp.lin2": self.mlp.lin2}
        return [problem for name, layer in layers.items() for problem in replaced(name, layer)]

    @property
    def is_replaced(self) -> bool:
        """Whether any layer is not SAM's own any more, so that calling it may have effects."""
        if type(self) is not Block or type(self.attn) is not Attention:
            return True
        others = {"norm1": self.norm1, "qkv": self.attn.qkv, "proj": self.attn.proj}
        return bool(self.replaced_mlp or any(replaced(*item) for item in others.items()))

    def _norm(
        self, name: str, x: Array, plan: BlockPlan, reader: nnx.Module | None = None
    ) -> Array | Float8Rows:
        """A LayerNorm's output in the compute dtype, or in e4m3 if it has one reader and that can.

        The quantisation is then no pass of its own.
        """
        layer, dtype = getattr(self, name), self.dtypes.compute
        if problems := replaced(name, layer):
            return called(layer, x, problems, plan).astype(dtype)
        arrays = _arrays(dtype, layer.scale, layer.bias)
        if type(reader) is not Float8Linear:
            return layer_norm(x, *arrays, dtype=dtype, **_options(plan))
        x, arrays = without_gradient((x, arrays))
        return layer_norm(x, *arrays, dtype=jnp.float8_e4m3fn, **_options(plan))

    def _replaced_mlp(self, tokens: Array, routed: Array | None, plan: BlockPlan) -> Array:
        """The MLP whose layers a user replaced: they are called, in plain XLA."""
        resolve(plan.implementation, function="the MLP", problems=self.replaced_mlp)

        def update(x: Array) -> Array:
            normed = self._norm("norm2", x, plan)
            assert not isinstance(normed, Float8Rows), "layers that are called quantise themselves"
            return self.mlp(normed).astype(x.dtype)

        if routed is None:
            return add(tokens, update(tokens))
        chosen = update(jnp.take_along_axis(tokens, routed[..., None], axis=1))
        image = jnp.arange(len(tokens))[:, None]
        return tokens.at[image, routed].add(chosen, unique_indices=True)

    def _mlp_weights(self) -> MLPWeights:
        norm2, lin1, lin2, dtype = self.norm2, self.mlp.lin1, self.mlp.lin2, self.dtypes.compute
        norm_scale, norm_bias, bias1, bias2 = _arrays(
            dtype, norm2.scale, norm2.bias, lin1.bias, lin2.bias
        )
        kernel1, kernel2 = (
            layer.weight if isinstance(layer, Float8Linear) else kernel_of(layer, dtype)
            for layer in (lin1, lin2)
        )
        scale = static_scale(lin2)
        return MLPWeights(norm_scale, norm_bias, kernel1, bias1, kernel2, bias2, scale)


class Attention(nnx.Module):
    """Multi-head attention with decomposed relative position bias, or without a bias.

    `softmax(q k^T / sqrt(D) + BH + BW) v` with `BH[q, k] = q . R_h[row(q) - row(k) + S - 1]` and BW
    likewise for columns. Keys and values are projected without their bias: the key bias adds the
    same to all logits of a query, so it cancels, and the value bias passes through the softmax
    unchanged, so it is added behind it. A padded token of a window is then k = 0, v = 0.

    A layer in the place of `qkv` or `proj` that is no plain `nnx.Linear` (`nnx.LoRALinear`, say) is
    called as it is, in plain XLA; what it makes of zeros then stands for its bias.
    """

    def __init__(self, config: BlockConfig, *, dtypes: DTypes, rngs: nnx.Rngs):
        d, side = config.embed_dim, config.rel_pos_size
        self.config = config
        self.dtypes = dtypes
        self.qkv = linear(d, 3 * d, dtypes=dtypes, rngs=rngs)
        self.proj = linear(d, d, dtypes=dtypes, rngs=rngs)
        if side is not None:
            self.rel_pos_h = zeros(2 * side - 1, config.head_dim, dtypes=dtypes)
            self.rel_pos_w = zeros(2 * side - 1, config.head_dim, dtypes=dtypes)

    def __call__(
        self,
        x: Float[Array, "B Gh Gw d"],
        block_input: Float[Array, "B Gh Gw d"],
        plan: BlockPlan,
        rankings: Rankings,
    ) -> tuple[Float[Array, "B Gh Gw d"], Rankings]:
        """Attend and project; arguments as `attend`."""
        attended, rankings = self.attend(x, block_input, plan, rankings)
        return self.project(attended, plan), rankings

    def attend(
        self,
        x: Float[Array, "B Gh Gw d"] | Float8Rows,
        block_input: Float[Array, "B Gh Gw d"],
        plan: BlockPlan,
        rankings: Rankings,
        tables: AttentionTables | None = None,
        out_scale: Float[Array, ""] | None = None,
    ) -> tuple[Float[Array, "B Gh Gw d"] | Float8Rows, Rankings]:
        """Attend over the grid or in windows, without the value bias and the projection.

        Args:
            x: The tokens after LayerNorm, quantised only where `qkv` is in float8.
            block_input: The tokens before it, which a ranking may look at.
            plan: Layout and options of this block.
            rankings: What the blocks before have ranked.
            tables: What `tables` returned for this grid; None makes them.
            out_scale: Of an output in e4m3; None leaves it in the compute dtype.
        """
        shape, d = block_input.shape, self.config.embed_dim
        tables = tables or self.tables(plan.grid, plan.frame)
        bias = self._qkv_bias(self.dtypes.compute)
        if tables.qkv_bias is None:
            assert not isinstance(x, Float8Rows), "what is called here is no layer in float8"
            qkv = called(self.qkv, x, replaced("qkv", self.qkv), plan).astype(x.dtype)
            qkv = qkv - jnp.where(np.arange(3 * d) < d, 0, bias)
        else:
            qkv = product(self.qkv, x, tables.qkv_bias, implementation=plan.implementation)
        qkv = qkv.reshape(*shape[:3], 3, self.config.num_heads, -1)
        key_bias = bias[d : 2 * d].reshape(self.config.num_heads, -1)
        rankings = plan.rank(rankings, qkv[:, :, :, 1], key_bias, block_input)
        sequence, block_order = plan.attention_order(rankings)
        options: Any = {
            "rel_pos_h": tables.rel_pos_h,
            "rel_pos_w": tables.rel_pos_w,
            "layout": plan.layout,
            "implementation": plan.implementation,
            "out_scale": out_scale,
        }
        if self.config.window_size is None:
            out = stripe_attention(qkv, sequence=sequence, block_order=block_order, **options)
        else:
            window = self.config.window_size
            out = window_attention(qkv, window_size=window, order=sequence, **options)
        if isinstance(out, Float8Rows):
            return out._replace(values=out.values.reshape(shape)), rankings
        return out.reshape(shape), rankings

    def project(
        self,
        attended: Float[Array, "B Gh Gw d"] | Float8Rows,
        plan: BlockPlan,
        tables: AttentionTables | None = None,
        residual: Float[Array, "B Gh Gw d"] | None = None,
    ) -> Float[Array, "B Gh Gw d"]:
        """The output projection of what `attend` returned, added to `residual` if there is one."""
        tables = tables or self.tables(plan.grid, plan.frame)
        if tables.proj_bias is None:
            assert not isinstance(attended, Float8Rows), "what is called is no layer in float8"
            value_bias = self._qkv_bias(attended.dtype)[2 * attended.shape[-1] :]
            out = called(self.proj, attended + value_bias, replaced("proj", self.proj), plan)
            return out.astype(attended.dtype) if residual is None else add(residual, out)
        options: Any = {"residual": residual, "implementation": plan.implementation}
        return product(self.proj, attended, tables.proj_bias, **options)

    def tables(self, grid: Grid, frame: Grid) -> AttentionTables:
        """What `ImageEncoder.tables` holds for this block."""
        return AttentionTables(
            self._q_bias(), self._proj_bias(), *self._position_tables(grid, frame)
        )

    def _q_bias(self) -> Array | None:
        """The bias of `qkv` for the queries alone; None where that is no plain product."""
        if replaced("qkv", self.qkv):
            return None
        d = self.config.embed_dim
        return jnp.where(np.arange(3 * d) < d, self._qkv_bias(self.dtypes.compute), 0)

    def _proj_bias(self) -> Array | None:
        """The projection's bias and the value bias behind it; None where that is no product."""
        if replaced("proj", self.proj):
            return None
        dtype, d = self.dtypes.compute, self.config.embed_dim
        assert self.proj.bias is not None
        kernel, bias = kernel_of(self.proj, dtype), self.proj.bias[...].astype(dtype)
        value_bias = self._qkv_bias(dtype)[2 * d :]
        options = {"precision": self.dtypes.precision, "preferred_element_type": jnp.float32}
        return bias + jnp.matmul(value_bias, kernel, **options)

    def _qkv_bias(self, dtype: DTypeLike) -> Array:
        """The bias of queries, keys and values: what the layer makes of a padded token's zeros."""
        if not replaced("qkv", self.qkv):
            assert self.qkv.bias is not None
            return self.qkv.bias[...].astype(dtype)
        zero = jnp.zeros((1, self.config.embed_dim), self.dtypes.compute)
        return self.qkv(zero)[0].astype(dtype)

    def _position_tables(self, grid: Grid, frame: Grid) -> tuple[Array | None, Array | None]:
        window = self.config.window_size
        if self.config.rel_pos_size is None:
            return None, None
        tables = []
        rel_pos = (self.rel_pos_h, self.rel_pos_w)
        for values, side, whole in zip(rel_pos, grid, frame, strict=True):
            table = relative_table(values[...], whole, window)[:side]
            if window is None:
                table = table[:, :side]
            else:
                table = jnp.pad(table, ((0, 0), (0, max(0, REL - window)), (0, 0)))
            tables.append(table.astype(self.dtypes.compute))
        return tables[0], tables[1]


def replaced(name: str, layer: Any) -> list[str]:
    """What keeps a kernel from reading a layer's arrays: it is not the plain layer of SAM's.

    A subclass may compute anything, as may a `dot_general` of one's own.
    """
    expected = (nnx.LayerNorm,) if name.startswith("norm") else (nnx.Linear, Float8Linear)
    if type(layer) not in expected:
        what = f"nnx.{expected[0].__name__}"
        return [f"{name} must be a plain {what} for the kernel, got {type(layer).__name__}"]
    if layer.bias is None:
        return [f"{name} must have a bias for the kernel, got none"]
    if getattr(layer, "dot_general", jax.lax.dot_general) is not jax.lax.dot_general:
        return [f"{name} must have jax.lax.dot_general for the kernel, got another dot_general"]
    return []


def called(layer: Any, x: Array, problems: list[str], plan: BlockPlan) -> Array:
    """The output of a layer that the kernels cannot read, where the implementation allows XLA.

    Raises:
        ValueError: The kernels are asked for.
    """
    resolve(plan.implementation, function="this layer", problems=problems)
    return layer(x)


def run_block(
    block: Block,
    x: Float[Array, "B Gh Gw d"],
    plan: BlockPlan,
    rankings: Rankings,
    tables: AttentionTables | None,
    *,
    remat: bool = False,
) -> tuple[Float[Array, "B Gh Gw d"], Rankings]:
    """Apply a block; blocks of one kind, with equal plans, are traced and lowered once.

    A block with a layer that is not SAM's own is called where it stands, since such a layer may
    draw random numbers or keep state.

    Args:
        block: The block.
        x: The residual stream.
        plan: What the block does.
        rankings: What the blocks before it have ranked.
        tables: What the block derives from its weights; None makes it.
        remat: Whether a gradient computes the block again instead of keeping what is inside.
    """
    if block.is_replaced:

        def call(block: Block, *arrays: Any) -> tuple[Array, Rankings]:
            return block(arrays[0], plan, *arrays[1:])

        return (nnx.remat(call) if remat else call)(block, x, rankings, tables)
    program = Program.of(block)
    return _run_block(program.graph, plan, remat, program.leaves, x, rankings, tables)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _run_block(
    graph: Graph, plan: BlockPlan, remat: bool, leaves: list[Array], *arrays: Any
) -> tuple[Array, Rankings]:
    def call(leaves: list[Array], x: Array, *others: Any) -> tuple[Array, Rankings]:
        return graph.merge(leaves)(x, plan, *others)

    return (jax.checkpoint(call) if remat else call)(leaves, *arrays)


def _arrays(dtype: DTypeLike, *params: nnx.Param[Array] | None) -> list[Array]:
    """Parameters that there are, in one dtype."""
    return [param[...].astype(dtype) for param in params if param is not None]


def _options(plan: BlockPlan) -> dict[str, Any]:
    return {"epsilon": LAYER_NORM_EPSILON, "implementation": plan.implementation}


def relative_table(
    rel_pos: Float[Array, "length D"], grid: int, window_size: int | None
) -> Float[Array, "grid side D"]:
    """Rows `rel_pos[q - k + side - 1]` for every query and key coordinate along one axis.

    A table for another grid is interpolated linearly, as SAM does. In windows, q and k are
    coordinates inside a window, and only k's run over `side = window_size`.
    """
    side = window_size or grid
    length = 2 * side - 1
    if rel_pos.shape[0] != length:
        rel_pos = jax.image.resize(rel_pos, (length, rel_pos.shape[1]), "linear", antialias=False)
    query = np.arange(grid) % side
    return rel_pos[query[:, None] - np.arange(side)[None] + side - 1]
