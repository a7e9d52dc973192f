"""PyTorch's functions of the kernels suite, from the same packed inputs as ours.

Each is named as its case's op, and runs in a CUDA graph of several runs, so that no launch waits
for the host.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from benchmarks.cases.kernel_cases import Case
from benchmarks.peers import PEERS
from benchmarks.peers.torch_models import Torch
from benchmarks.peers.torch_sam import attend, block_mask
from benchmarks.run.timing import Runnable

Arrays = dict[str, Tensor]
EPSILON = 1e-6


def stripe(implementation: str, case: Case, loops: int) -> Runnable:
    """Global attention."""
    device = Torch(implementation, case.dtype)
    mask = None if case.layout.is_dense else block_mask(case.layout, device.place)

    def function(arrays: Arrays) -> Tensor:
        qkv = arrays["qkv"]
        batch, height, width, _, heads, _ = qkv.shape
        rel = (x.permute(0, 3, 1, 2, 4).flatten(2, 3) for x in _relative_position(arrays))
        q, k, v = qkv.reshape(batch, height * width, 3, heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        sequence = arrays["sequence"].expand(batch, -1) if "sequence" in arrays else None
        attention = PEERS[implementation].attention
        out = attend(attention, q, k, v, *rel, sequence=sequence, mask=mask)
        return out.transpose(1, 2).reshape(batch, height, width, heads, -1)

    return _runnable(implementation, case, function, loops)


def window(implementation: str, case: Case, loops: int) -> Runnable:
    """Windowed attention."""
    from transformers.models.sam.modeling_sam import SamVisionLayer

    side, bar_len = case.window_size, case.layout.bar_len
    # What cuts a map into windows uses nothing of its module.
    cut: Any = SamVisionLayer.window_partition
    join: Any = SamVisionLayer.window_unpartition

    def function(arrays: Arrays) -> Tensor:
        qkv = arrays["qkv"]
        batch, height, width, _, heads, head_dim = qkv.shape

        def windows(x: Tensor, channels: int) -> Tensor:
            """[B, Gh, Gw, ...] to [B W, w w, heads, channels]."""
            x = cut(None, x.reshape(batch, height, width, -1), side)[0]
            return x.reshape(x.shape[0], side * side, -1, channels)

        q, k, v = windows(qkv, heads * head_dim).unbind(2)
        q, k, v = (x.unflatten(-1, (heads, head_dim)).transpose(1, 2) for x in (q, k, v))
        rel = (windows(x, side).transpose(1, 2) for x in _relative_position(arrays))
        bar = arrays["order"].flatten(0, 1)[:, :bar_len] if "order" in arrays else None
        out = attend(PEERS[implementation].attention, q, k, v, *rel, sequence=bar)
        out = out.transpose(1, 2).reshape(-1, side, side, heads * head_dim)
        padded = height + -height % side, width + -width % side
        out = join(None, out, side, padded, (height, width))
        return out.unflatten(-1, (heads, head_dim))

    return _runnable(implementation, case, function, loops)


def mlp(implementation: str, case: Case, loops: int) -> Runnable:
    """The MLP with its LayerNorm and residual, on all tokens or on the routed ones."""

    def update(x: Tensor, arrays: Arrays) -> Tensor:
        d = x.shape[-1]
        y = F.layer_norm(x, (d,), arrays["norm_scale"], arrays["norm_bias"], EPSILON)
        y = F.gelu(F.linear(y, arrays["kernel1"].mT, arrays["bias1"]))
        return F.linear(y, arrays["kernel2"].mT, arrays["bias2"])

    def function(arrays: Arrays) -> Tensor:
        x = arrays["x"]
        if case.density == 1:
            return x + update(x, arrays)
        index = arrays["index"][..., None].expand(-1, -1, x.shape[-1])
        return x.scatter_add_(1, index, update(x.gather(1, index), arrays))  # in place, as ours

    return _runnable(implementation, case, function, loops)


def _relative_position(arrays: Arrays) -> tuple[Tensor, Tensor]:
    """The query side of the bias, [B, Gh, Gw, H, keys]."""
    q = arrays["qkv"][:, :, :, 0]
    return (
        torch.einsum("byxhd,yid->byxhi", q, arrays["rel_pos_h"]),
        torch.einsum("byxhd,xjd->byxhj", q, arrays["rel_pos_w"]),
    )


def _runnable(
    implementation: str, case: Case, function: Callable[[Arrays], Tensor], loops: int
) -> Runnable:
    """The function of the case's arrays, compiled and warmed up; its output is the last image's."""
    device = Torch(implementation, case.dtype)
    arrays = {}
    for name, x in case.arrays().items():
        dtype = device.dtype if x.dtype == "float32" else torch.int64
        arrays[name] = torch.from_numpy(x).to(device.place, dtype)
    function = device.compiled(function)

    def run() -> Tensor:
        with torch.inference_mode():
            return function(arrays)

    out = run()[-1].float().cpu().numpy().copy()  # the MLP works in place
    for _ in range(2):
        run()
    graph = _capture(run, loops) if device.on_gpu else None
    launch, runs = (run, 1) if graph is None else (graph.replay, loops)
    notes = {"device": device.name, "cuda_graph": graph is not None}
    return Runnable(device, launch, out, notes | {"what": PEERS[implementation].what}, runs)


def _capture(run: Callable[[], Tensor], loops: int) -> torch.cuda.CUDAGraph | None:
    """Runs in one CUDA graph; None where what runs cannot be captured, and the record says so."""
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            for _ in range(loops):
                run()
    except RuntimeError as error:
        print(f"no CUDA graph: {error}")
        torch.cuda.synchronize()
        return None
    return graph
