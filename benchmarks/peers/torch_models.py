"""PyTorch's encoders and predictors: inference mode, and the same weights as ours.

FlexAttention runs uncompiled on a CPU, for tests. Of a predictor, `preprocess` is SamProcessor, on
the GPU where its backend is torchvision; `encoder` is transfer and `get_image_embeddings`;
`decoder` takes prompts and features to low-resolution logits; `upscale` is `post_process_masks` on
the model's device, and the way to the host.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks import records
from benchmarks.cases import shapes
from benchmarks.peers import PEERS, Peer, Predictor
from benchmarks.records import Record
from benchmarks.run.process import NotRunError
from benchmarks.run.timing import Runnable
from sparsesam_jax.config import SamConfig, Sparsity


def encoder(
    implementation: str,
    model: str,
    batch: int,
    dtype: str,
    sparsity: Sparsity | None,
    folder: str | None = None,
) -> Runnable:
    """One peer, compiled and warmed up; its output is the features of all images.

    With a folder, transformers loads its weights from there.
    """
    device, torch_dtype = settings(implementation, dtype)
    config = shapes.model_config(model)
    module = load_encoder(config, implementation, sparsity, device, torch_dtype, folder)
    pixels = torch.from_numpy(shapes.random_pixels(config, batch)).to(device, torch_dtype)
    pixels = pixels.permute(0, 3, 1, 2).contiguous()
    program = compiled(module, PEERS[implementation], device)

    def launch() -> Tensor:
        with torch.inference_mode():
            out = program(pixels)
        return out if isinstance(out, Tensor) else out.last_hidden_state

    start = time.perf_counter()
    first = launch().float().permute(0, 2, 3, 1).cpu().numpy()
    first_run_s = time.perf_counter() - start
    launch()  # a CUDA graph is recorded in the second run
    synchronize(device)
    if device.type == "cuda":
        torch.cuda.empty_cache()  # others wait for their turn on the same GPU
    layers = module.layers if hasattr(module, "layers") else module.blocks
    notes = {
        "compile_s": first_run_s if program is not module else None,
        "first_run_s": first_run_s,
        "what": PEERS[implementation].what,
        "attention": type(layers[0].attn).__name__,
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY"),
    }
    return runnable(launch, device, output=first, notes=notes)


def runnable(
    launch: Callable[[], Any],
    device: torch.device,
    *,
    output: np.ndarray,
    notes: Record,
    runs: int = 1,
) -> Runnable:
    """What a launch of PyTorch is to the suites."""

    def wait(out: Any) -> Any:
        synchronize(device)
        return out

    return Runnable(
        launch=launch,
        wait=wait,
        output=output,
        notes={"device": device_name(device), **notes},
        start_peak=lambda: start_peak(device),
        peak=lambda: memory(device),
        runs=runs,
    )


def predictor(implementation: str, model: str, dtype: str) -> Predictor:
    """The model and the processor of transformers from an image to its masks, and the parts."""
    from transformers import SamImageProcessor, SamProcessor

    config, peer = shapes.model_config(model), PEERS[implementation]
    device, torch_dtype = settings(implementation, dtype)
    sam = load_transformers(config, implementation, device, torch_dtype)
    sam.vision_encoder = compiled(sam.vision_encoder, peer, device)
    side, size = config.image_encoder.image_size, shapes.photo_size(config)
    images = SamImageProcessor(
        size={"longest_edge": side}, pad_size={"height": side, "width": side}
    )
    processor: Any = SamProcessor(images)
    image = shapes.random_image(*size)

    def preprocess(points: np.ndarray) -> Any:
        return processor(
            images=image,
            input_points=points[None].tolist(),
            input_labels=np.ones((1, *points.shape[:-1]), int).tolist(),
            return_tensors="pt",
            device=str(device),
        )

    def encode(inputs: Any) -> Tensor:
        return sam.get_image_embeddings(inputs["pixel_values"].to(device, torch_dtype))

    def decode(inputs: Any, features: Tensor) -> Any:
        points, labels = (inputs[f"input_{name}"].to(device) for name in ("points", "labels"))
        return sam(image_embeddings=features, input_points=points, input_labels=labels)

    def upscale(inputs: Any, decoded: Any) -> np.ndarray:
        sizes = inputs["original_sizes"], inputs["reshaped_input_sizes"]
        return processor.post_process_masks(decoded.pred_masks, *sizes)[0].cpu().numpy()

    @torch.inference_mode()
    def whole(points: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        inputs = preprocess(points)
        decoded = decode(inputs, encode(inputs))
        masks = upscale(inputs, decoded)
        iou, logits = (x[0].float().cpu().numpy() for x in (decoded.iou_scores, decoded.pred_masks))
        return masks, iou, logits

    def waiting(part: Callable[..., Any], *arguments: Any) -> Callable[[], None]:
        @torch.inference_mode()
        def call() -> None:
            part(*arguments)
            synchronize(device)

        return call

    @torch.inference_mode()
    def parts(points: np.ndarray) -> dict[str, Callable[[], Any]]:
        inputs = preprocess(points)
        features = encode(inputs)
        return {
            "preprocess": waiting(preprocess, points),
            "encoder": waiting(encode, inputs),
            "decoder": waiting(decode, inputs, features),
            "upscale": waiting(upscale, inputs, decode(inputs, features)),
        }

    first, start = shapes.diagonal_points(1, *size), time.perf_counter()
    whole(first)
    first_run_s = time.perf_counter() - start
    where = f"{type(images).__name__} on the {preprocess(first)['pixel_values'].device.type}"
    if device.type == "cuda":
        torch.cuda.empty_cache()  # others wait for their turn on the same GPU
    notes = {
        "compile_s": first_run_s if peer.compiled else None,
        "first_run_s": first_run_s,
        "device": device_name(device),
        "what": f"{peer.what}; preprocess is {where}, upscale runs on the {device.type}",
    }
    return Predictor(whole, parts, notes, lambda: start_peak(device), lambda: memory(device))


def settings(implementation: str, dtype: str) -> tuple[torch.device, torch.dtype]:
    """Where a peer runs, and its dtype; in float32, products are in float32 too."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if PEERS[implementation].needs_gpu and device.type == "cpu":
        raise NotRunError("torch.compile is measured on a GPU; there is none")
    # What is left in float32, such as a float32 reference, must not become TF32 unnoticed.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = dtype != "float32"
    return device, getattr(torch, dtype)


def compiled(program: Any, peer: Peer, device: torch.device) -> Any:
    """A module or function as a peer runs it: under torch.compile, or itself."""
    if peer.compiled is None or device.type == "cpu":
        return program
    return torch.compile(program, mode=peer.compiled)


def load_encoder(
    config: SamConfig,
    implementation: str,
    sparsity: Sparsity | None,
    device: torch.device,
    dtype: torch.dtype,
    folder: str | None = None,
) -> Any:
    """A peer's encoder with `shapes.random_weights`."""
    peer = PEERS[implementation]
    if sparsity is not None and "encoder" not in peer.sparse.split():
        raise NotRunError(f"{implementation} knows no sparsity")
    if peer.package == "transformers":
        return load_transformers(config, implementation, device, dtype, folder).vision_encoder
    from benchmarks.peers.torch_sam import ImageEncoder

    module = ImageEncoder(config.image_encoder, peer.attention, sparsity)
    module.static.to(device)
    prefix = "image_encoder."
    tensors = _random_tensors(config, "meta", dtype).items()
    module.load_state_dict(
        {name.removeprefix(prefix): x for name, x in tensors if name.startswith(prefix)}
    )
    return module.to(device, dtype).eval()


def load_transformers(
    config: SamConfig,
    implementation: str,
    device: torch.device,
    dtype: torch.dtype,
    folder: str | None = None,
) -> Any:
    """The whole SamModel of transformers with `shapes.random_weights`, or those of a folder."""
    from transformers import SamConfig as HuggingFaceConfig
    from transformers import SamModel

    attention = PEERS[implementation].attention
    if folder is not None:
        options: Any = dict(attn_implementation=attention, dtype=dtype, local_files_only=True)
        loaded: Any = SamModel.from_pretrained(folder, **options)
        return loaded.to(device).eval()
    from sparsesam_jax.checkpoints import huggingface
    from sparsesam_jax.checkpoints.rules import HUGGINGFACE_TIED

    described = huggingface.describe(config)
    described = {key: described[key] for key in described if key.endswith("_config")}
    whole: Any = HuggingFaceConfig(**described)
    whole._attn_implementation = whole.vision_config._attn_implementation = attention
    model: Any = SamModel(whole)
    tensors = _random_tensors(config, "huggingface", dtype)
    saved, tied = HUGGINGFACE_TIED
    model.load_state_dict(tensors | {tied: tensors[saved]})
    return model.to(device, dtype).eval()


def _random_tensors(config: SamConfig, file_format: Any, dtype: torch.dtype) -> dict[str, Tensor]:
    """`shapes.random_weights` under the names of a format."""
    from sparsesam_jax.checkpoints.rules import tensor_names, to_torch

    weights = shapes.random_weights(config)
    found = {}
    for key, (name, transform) in tensor_names(weights, file_format, config).items():
        array = np.ascontiguousarray(to_torch(weights.pop(key), transform))
        found[name] = torch.from_numpy(array).to(dtype)
    return found


def synchronize(device: torch.device) -> None:
    """Wait for all that was launched."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def start_peak(device: torch.device) -> None:
    """Forget the peak of memory until now."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()


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
    return torch.cuda.get_device_name() if device.type == "cuda" else records.cpu_name()
