"""PyTorch's encoders and predictors: inference mode, and the same weights as ours.

Of a predictor, `preprocess` is SamProcessor, on the GPU where its backend is torchvision; `encoder`
is transfer and `get_image_embeddings`; `decoder` takes prompts and features to low-resolution
logits; `upscale` is `post_process_masks` on the model's device, and the way to the host.
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
from benchmarks.peers import PEERS, Predictor
from benchmarks.records import Record
from benchmarks.run.jobs import NotRunError
from benchmarks.run.timing import Runnable
from sparsesam_jax.config import SamConfig, Sparsity


class Torch:
    """Where a peer runs and in what dtype; in float32, products are in float32 too.

    Raises:
        NotRunError: The peer needs a GPU.
    """

    def __init__(self, implementation: str, dtype: str):
        self.on_gpu, self._peer = torch.cuda.is_available(), PEERS[implementation]
        if self._peer.needs_gpu and not self.on_gpu:
            raise NotRunError("torch.compile is measured on a GPU; there is none")
        self.place, self.dtype = (
            torch.device("cuda" if self.on_gpu else "cpu"),
            getattr(torch, dtype),
        )
        # What is left in float32, such as a float32 reference, must not become TF32 unnoticed.
        allowed = dtype != "float32"
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allowed

    @property
    def name(self) -> str:
        """The GPU's name, or the processor's."""
        return torch.cuda.get_device_name() if self.on_gpu else records.cpu_name()

    def compiled(self, program: Any) -> Any:
        """A module or function as the peer runs it: under torch.compile, or itself."""
        if self._peer.compiled is None or not self.on_gpu:
            return program
        return torch.compile(program, mode=self._peer.compiled)

    def wait(self, out: Any = None) -> Any:
        """Wait for all that was launched."""
        if self.on_gpu:
            torch.cuda.synchronize()
        return out

    def start_peak(self) -> None:
        """Forget the peak of memory until now."""
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats()

    def peak(self) -> Record:
        """Peak of what PyTorch allocated, and of what it reserved, since it was reset."""
        if not self.on_gpu:
            return {"peak_mib": None, "peak_reserved_mib": None}
        sizes = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
        return {"peak_mib": sizes[0] / 2**20, "peak_reserved_mib": sizes[1] / 2**20}


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
    device, config = Torch(implementation, dtype), shapes.model_config(model)
    module = load_encoder(config, implementation, sparsity, device, folder)
    pixels = torch.from_numpy(shapes.random_pixels(config, batch)).to(device.place, device.dtype)
    pixels = pixels.permute(0, 3, 1, 2).contiguous()
    program = device.compiled(module)

    def launch() -> Tensor:
        with torch.inference_mode():
            out = program(pixels)
        return out if isinstance(out, Tensor) else out.last_hidden_state

    start = time.perf_counter()
    first = launch().float().permute(0, 2, 3, 1).cpu().numpy()
    first_run_s = time.perf_counter() - start
    device.wait(launch())  # a CUDA graph is recorded in the second run
    torch.cuda.empty_cache()  # others wait for their turn on the same GPU
    notes = {
        "device": device.name,
        "compile_s": first_run_s if program is not module else None,
        "first_run_s": first_run_s,
        "what": PEERS[implementation].what,
        "attention": getattr(module, "attention", type(module.layers[0].attn).__name__),
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY"),
    }
    return Runnable(device, launch, first, notes)


def predictor(implementation: str, model: str, dtype: str) -> Predictor:
    """The model and the processor of transformers from an image to its masks, and the parts."""
    from transformers import SamImageProcessor, SamProcessor

    config, device = shapes.model_config(model), Torch(implementation, dtype)
    sam = load_transformers(config, implementation, device)
    sam.vision_encoder = device.compiled(sam.vision_encoder)
    side, size = config.image_encoder.image_size, shapes.photo_size(config)
    padded = {"height": side, "width": side}
    images = SamImageProcessor(size={"longest_edge": side}, pad_size=padded)
    processor: Any = SamProcessor(images)
    image = shapes.random_image(*size)

    def preprocess(points: np.ndarray) -> Any:
        labels = np.ones((1, *points.shape[:-1]), int).tolist()
        prompts = {"input_points": points[None].tolist(), "input_labels": labels}
        return processor(images=image, **prompts, return_tensors="pt", device=str(device.place))

    def encode(inputs: Any) -> Tensor:
        return sam.get_image_embeddings(inputs["pixel_values"].to(device.place, device.dtype))

    def decode(inputs: Any, features: Tensor) -> Any:
        names = ("input_points", "input_labels")
        prompts = {name: inputs[name].to(device.place) for name in names}
        return sam(image_embeddings=features, **prompts)

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

    @torch.inference_mode()
    def parts(points: np.ndarray) -> dict[str, Callable[[], Any]]:
        inputs = preprocess(points)
        features = encode(inputs)
        decoded = decode(inputs, features)
        calls = {
            "preprocess": lambda: preprocess(points),
            "encoder": lambda: encode(inputs),
            "decoder": lambda: decode(inputs, features),
            "upscale": lambda: upscale(inputs, decoded),
        }
        waiting = {name: lambda part=part: device.wait(part()) for name, part in calls.items()}
        return {name: torch.inference_mode()(call) for name, call in waiting.items()}

    first, start = shapes.diagonal_points(1, *size), time.perf_counter()
    whole(first)
    first_run_s = time.perf_counter() - start
    where = f"{type(images).__name__} on the {preprocess(first)['pixel_values'].device.type}"
    torch.cuda.empty_cache()  # others wait for their turn on the same GPU
    peer, on = PEERS[implementation], device.place.type
    notes = {
        "compile_s": first_run_s if peer.compiled else None,
        "first_run_s": first_run_s,
        "device": device.name,
        "what": f"{peer.what}; preprocess is {where}, upscale runs on the {on}",
    }
    return Predictor(device, whole, parts, notes)


def load_encoder(
    config: SamConfig,
    implementation: str,
    sparsity: Sparsity | None,
    device: Torch,
    folder: str | None = None,
) -> Any:
    """A peer's encoder with `shapes.random_weights`."""
    peer = PEERS[implementation]
    if sparsity is not None and "encoder" not in peer.sparse.split():
        raise NotRunError(f"{implementation} knows no sparsity")
    encoder = load_transformers(config, implementation, device, folder).vision_encoder
    if peer.package == "transformers":
        return encoder
    from benchmarks.peers.torch_sam import ImageEncoder, Plan

    plan = Plan(config.image_encoder, sparsity, device.place)
    return ImageEncoder(encoder, peer.attention, plan).eval()


def load_transformers(
    config: SamConfig, implementation: str, device: Torch, folder: str | None = None
) -> Any:
    """The whole SamModel of transformers with `shapes.random_weights`, or those of a folder."""
    from transformers import SamConfig as HuggingFaceConfig
    from transformers import SamModel

    peer = PEERS[implementation]
    attention = peer.attention if peer.package == "transformers" else "eager"
    if folder is not None:
        options: Any = dict(attn_implementation=attention, dtype=device.dtype)
        loaded: Any = SamModel.from_pretrained(folder, **options, local_files_only=True)
        return loaded.to(device.place).eval()
    from sparsesam_jax.checkpoints import huggingface
    from sparsesam_jax.checkpoints.rules import HUGGINGFACE_TIED, tensor_names, to_torch

    described = huggingface.describe(config)
    described = {key: described[key] for key in described if key.endswith("_config")}
    whole: Any = HuggingFaceConfig(**described)
    whole._attn_implementation = whole.vision_config._attn_implementation = attention
    model: Any = SamModel(whole)
    weights, tensors = shapes.random_weights(config), {}
    for key, (name, transform) in tensor_names(weights, "huggingface", config).items():
        array = np.ascontiguousarray(to_torch(weights.pop(key), transform))
        tensors[name] = torch.from_numpy(array).to(device.dtype)
    saved, tied = HUGGINGFACE_TIED
    model.load_state_dict(tensors | {tied: tensors[saved]})
    return model.to(device.place, device.dtype).eval()
