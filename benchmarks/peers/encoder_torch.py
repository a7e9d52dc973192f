"""The PyTorch peers of the encoder suite: inference mode, and the same weights as ours.

`encoder_names.TORCH` says what each runs. FlexAttention runs uncompiled on a CPU, for tests.
`end_to_end_torch` takes transformers' whole model from here.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.cases import shapes
from benchmarks.encoder_names import TORCH
from benchmarks.peers.torch_sam import ImageEncoder
from benchmarks.records import Record
from benchmarks.run.process import NotRunError, Program
from benchmarks.run.timing import Spread, queued_ms, time_ms
from sparsesam_jax.checkpoints import huggingface
from sparsesam_jax.checkpoints.rules import HUGGINGFACE_TIED, Format, tensor_names, to_torch
from sparsesam_jax.config import SamConfig, Sparsity


def build(
    model: str,
    batch: int,
    implementation: str,
    dtype: str,
    sparsity: dict[str, Any] | None,
    runs: int,
    warmups: int,
) -> Program:
    """One peer, compiled and warmed up; its output is the first image's features."""
    device, torch_dtype = settings(implementation, dtype)
    config = shapes.model_config(model)
    kept = None if sparsity is None else Sparsity(**sparsity)
    encoder = load_encoder(config, implementation, kept, device, torch_dtype)
    pixels = torch.from_numpy(shapes.random_pixels(config, batch)).to(device, torch_dtype)
    pixels = pixels.permute(0, 3, 1, 2).contiguous()
    program = compiled(encoder, implementation, device)

    def launch() -> Tensor:
        with torch.inference_mode():
            out = program(pixels)
        return out if isinstance(out, Tensor) else out.last_hidden_state

    def wait(out: Tensor) -> Tensor:
        if device.type == "cuda":
            torch.cuda.synchronize()
        return out

    def call() -> Tensor:
        return wait(launch())

    start = time.perf_counter()
    first = call().float().permute(0, 2, 3, 1)[0].cpu().numpy()
    first_run_s = time.perf_counter() - start
    call()  # a CUDA graph is recorded in the second run
    if device.type == "cuda":
        torch.cuda.empty_cache()  # others wait for their turn on the same GPU

    def measure() -> Record:
        for _ in range(warmups):
            call()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        spread = Spread.of([time_ms(call) for _ in range(runs)])
        peak = memory(device)
        queued = {"queued_ms": queued_ms(launch, wait, runs)}
        return dict(spread._asdict()) | peak | queued

    notes = {
        "compile_s": first_run_s if program is not encoder else None,
        "first_run_s": first_run_s,
        "device": device_name(device),
        "what": TORCH[implementation],
    }
    return Program(first, measure, notes)


def settings(implementation: str, dtype: str) -> tuple[torch.device, torch.dtype]:
    """Where a peer runs, and its dtype; in float32, products are in float32 too."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if "compile" in implementation and device.type == "cpu":
        raise NotRunError("torch.compile is measured on a GPU; there is none")
    # What is left in float32, such as a float32 reference, must not become TF32 unnoticed.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = dtype != "float32"
    return device, getattr(torch, dtype)


def compiled(encoder: nn.Module, implementation: str, device: torch.device) -> Any:
    """The encoder as a peer runs it: under torch.compile, or itself."""
    if implementation == "compile-max-autotune":
        return torch.compile(encoder, mode="max-autotune")
    if implementation.endswith("compile") or (implementation == "flex" and device.type == "cuda"):
        return torch.compile(encoder)
    return encoder


def load_encoder(
    config: SamConfig,
    implementation: str,
    sparsity: Sparsity | None,
    device: torch.device,
    dtype: torch.dtype,
) -> nn.Module:
    """A peer's encoder with `shapes.random_weights`."""
    if sparsity is not None and implementation != "flex":
        raise NotRunError(f"{implementation} knows no sparsity")
    if implementation.startswith("transformers"):
        return load_transformers(config, implementation, device, dtype).vision_encoder
    attention = implementation if implementation in ("eager", "flex") else "sdpa"
    encoder = ImageEncoder(config.image_encoder, attention, sparsity)
    encoder.static.to(device)
    prefix = "image_encoder."
    tensors = _random_tensors(config, "meta", dtype).items()
    encoder.load_state_dict(
        {name.removeprefix(prefix): x for name, x in tensors if name.startswith(prefix)}
    )
    return encoder.to(device, dtype).eval()


def load_transformers(
    config: SamConfig, implementation: str, device: torch.device, dtype: torch.dtype
) -> Any:
    """The whole SamModel of transformers with `shapes.random_weights`."""
    from transformers import SamConfig as HuggingFaceConfig
    from transformers import SamModel

    described = huggingface.describe(config)
    described = {key: described[key] for key in described if key.endswith("_config")}
    whole: Any = HuggingFaceConfig(**described)
    attention = "eager" if implementation == "transformers-eager" else "sdpa"
    whole._attn_implementation = whole.vision_config._attn_implementation = attention
    model: Any = SamModel(whole)
    tensors = _random_tensors(config, "huggingface", dtype)
    saved, tied = HUGGINGFACE_TIED
    model.load_state_dict(tensors | {tied: tensors[saved]})
    return model.to(device, dtype).eval()


def _random_tensors(
    config: SamConfig, file_format: Format, dtype: torch.dtype
) -> dict[str, Tensor]:
    """`shapes.random_weights` under the names of a format."""
    weights = shapes.random_weights(config)
    names = tensor_names(weights, file_format, config)
    return {
        name: torch.from_numpy(np.ascontiguousarray(to_torch(weights.pop(key), transform))).to(
            dtype
        )
        for key, (name, transform) in names.items()
    }


def memory(device: torch.device) -> Record:
    """Peak of what PyTorch allocated, and of what it reserved, since it was reset."""
    if device.type == "cpu":
        return {"peak_mib": None, "peak_reserved_mib": None}
    return {
        "peak_mib": torch.cuda.max_memory_allocated() / 2**20,
        "peak_reserved_mib": torch.cuda.max_memory_reserved() / 2**20,
    }


def device_name(device: torch.device) -> str:
    """The GPU's name, or the processor's."""
    from benchmarks.records import cpu_name

    return torch.cuda.get_device_name() if device.type == "cuda" else cpu_name()
