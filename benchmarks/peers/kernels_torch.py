"""The functions of the kernels suite in PyTorch, from the same packed inputs.

Attention by all logits (`eager`), by SDPA with the bias in memory (`sdpa`, and `compile`d), or by
FlexAttention with the block mask and the bias in its score_mod (`flex`), or by the kernel of
segment-anything-fast where that package is installed; the MLP op by op (`eager`) or `compile`d.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from benchmarks.cases.kernel_cases import Case
from benchmarks.peers.encoder_torch import device_name, memory
from benchmarks.peers.torch_sam import (
    EPSILON,
    eager_attention,
    fast_attention,
    flex_attention,
    sdpa_attention,
    sdpa_bar_attention,
    window_partition,
    window_unpartition,
)
from benchmarks.peers.torch_sparse import block_mask, permute
from benchmarks.records import Record
from benchmarks.run.process import NotRunError, Program
from benchmarks.run.timing import Spread, time_ms

Arrays = dict[str, Tensor]


def build(case: dict[str, Any], implementation: str, runs: int, loops: int) -> Program:
    """One function, compiled and warmed up; its output is the last image's."""
    what = Case(**case)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if implementation == "compile" and device.type == "cpu":
        raise NotRunError("torch.compile is measured on a GPU; there is none")
    dtype = getattr(torch, what.dtype)
    arrays = {
        name: torch.from_numpy(x).to(device, dtype if x.dtype == "float32" else torch.int64)
        for name, x in what.arrays().items()
    }
    function = bind(what, implementation, device)
    if implementation in ("compile", "flex") and device.type == "cuda":
        function = torch.compile(function)

    def run() -> Tensor:
        with torch.inference_mode():
            return function(arrays)

    out = run()[-1].float().cpu().numpy().copy()  # the MLP works in place
    for _ in range(2):
        run()
    graph = _capture(run, loops) if device.type == "cuda" else None

    def call() -> None:
        if graph is not None:
            graph.replay()
            torch.cuda.synchronize()
        else:
            for _ in range(loops):
                run()
            if device.type == "cuda":
                torch.cuda.synchronize()

    def measure() -> Record:
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        for _ in range(2):
            call()
        spread = Spread.of([time_ms(call) / loops for _ in range(runs)])
        return dict(spread._asdict()) | memory(device)

    return Program(out, measure, {"device": device_name(device), "cuda_graph": graph is not None})


def _capture(run: Callable[[], Tensor], loops: int) -> torch.cuda.CUDAGraph | None:
    """Runs in one CUDA graph, so that no launch waits for the host.

    None where what runs cannot be captured; the record says so.
    """
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


def bind(case: Case, implementation: str, device: torch.device) -> Callable[[Arrays], Tensor]:
    """The function of the case's arrays."""
    if case.op == "mlp":
        return _routed_mlp if case.density < 1 else _mlp
    if case.op == "window":
        return lambda arrays: _windows(
            arrays, case.window_size, case.layout.bar_len, implementation
        )
    mask = None if case.layout.is_dense else block_mask(case.layout, device)
    return lambda arrays: _stripe(arrays, mask, implementation)


def _stripe(arrays: Arrays, mask: Any, implementation: str) -> Tensor:
    qkv = arrays["qkv"]
    batch, height, width, _, heads, _ = qkv.shape
    rel_h, rel_w = (x.permute(0, 3, 1, 2, 4).flatten(2, 3) for x in _relative_position(arrays))
    q, k, v = qkv.reshape(batch, height * width, 3, heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
    if implementation == "flex":
        sequence = arrays.get("sequence")
        if sequence is None:
            sequence = torch.arange(height * width, device=q.device)
        places = sequence.expand(batch, -1)
        if mask is not None:
            q, k, v, rel_h, rel_w = (permute(x, places) for x in (q, k, v, rel_h, rel_w))
        out = flex_attention(q, k, v, rel_h, rel_w, places // width, places % width, mask)
        out = out if mask is None else permute(out, places.argsort(-1))
    elif implementation == "segment-anything-fast":
        out = fast_attention(q, k, v, rel_h, rel_w)
    elif implementation == "eager":
        out = eager_attention(q, k, v, rel_h, rel_w)
    else:
        out = sdpa_attention(q, k, v, rel_h, rel_w)
    return out.transpose(1, 2).reshape(batch, height, width, heads, -1)


def _windows(arrays: Arrays, side: int, bar_len: int, implementation: str) -> Tensor:
    qkv = arrays["qkv"]
    batch, height, width, _, heads, head_dim = qkv.shape

    def windows(x: Tensor, channels: int) -> Tensor:
        """[B, Gh, Gw, ...] to [B W, w w, heads, channels]."""
        x = window_partition(x.reshape(batch, height, width, -1), side)
        return x.reshape(x.shape[0], side * side, -1, channels)

    q, k, v = windows(qkv, heads * head_dim).unbind(2)
    q, k, v = (x.unflatten(-1, (heads, head_dim)).transpose(1, 2) for x in (q, k, v))
    rel_h, rel_w = (windows(x, side).transpose(1, 2) for x in _relative_position(arrays))
    if "order" in arrays:
        bar = arrays["order"].flatten(0, 1)[:, :bar_len]
        out = sdpa_bar_attention(q, k, v, rel_h, rel_w, bar)
    elif implementation == "eager":
        out = eager_attention(q, k, v, rel_h, rel_w)
    else:
        out = sdpa_attention(q, k, v, rel_h, rel_w)
    out = out.transpose(1, 2).reshape(-1, side, side, heads * head_dim)
    return window_unpartition(out, side, (height, width)).unflatten(-1, (heads, head_dim))


def _relative_position(arrays: Arrays) -> tuple[Tensor, Tensor]:
    """The query side of the bias, [B, Gh, Gw, H, keys]."""
    q = arrays["qkv"][:, :, :, 0]
    return (
        torch.einsum("byxhd,yid->byxhi", q, arrays["rel_pos_h"]),
        torch.einsum("byxhd,xjd->byxhj", q, arrays["rel_pos_w"]),
    )


def _update(x: Tensor, arrays: Arrays) -> Tensor:
    d = x.shape[-1]
    y = F.layer_norm(x, (d,), arrays["norm_scale"], arrays["norm_bias"], EPSILON)
    y = F.gelu(F.linear(y, arrays["kernel1"].mT, arrays["bias1"]))
    return F.linear(y, arrays["kernel2"].mT, arrays["bias2"])


def _mlp(arrays: Arrays) -> Tensor:
    return arrays["x"] + _update(arrays["x"], arrays)


def _routed_mlp(arrays: Arrays) -> Tensor:
    x = arrays["x"]
    index = arrays["index"][..., None].expand(-1, -1, x.shape[-1])
    return x.scatter_add_(1, index, _update(x.gather(1, index), arrays))  # in place, as ours
