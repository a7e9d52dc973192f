"""transformers' SamModel from an image to its masks: inference mode, the same weights as ours.

`preprocess` is SamProcessor, on the GPU where its backend is torchvision; `encoder` is transfer and
`get_image_embeddings`; `decoder` takes prompts and features to low-resolution logits; `upscale` is
`post_process_masks` on the model's device, and the way to the host. What takes all of it is timed
by itself, without waiting between the parts.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.cases import shapes
from benchmarks.peers.encoder_torch import (
    compiled,
    device_name,
    load_transformers,
    memory,
    settings,
)
from benchmarks.records import Record
from benchmarks.run.process import Program
from benchmarks.run.timing import Spread, time_ms
from benchmarks.suites.end_to_end import PEERS, PROMPTS, image_size, row


class Predictor:
    """What `SamPredictor` does, by transformers' model and processor."""

    def __init__(self, model: str, implementation: str, dtype: str):
        from transformers import SamImageProcessor, SamProcessor

        config = shapes.model_config(model)
        self.device, self.dtype = settings(implementation, dtype)
        self.model = load_transformers(config, implementation, self.device, self.dtype)
        self.model.vision_encoder = compiled(self.model.vision_encoder, implementation, self.device)
        side = config.image_encoder.image_size
        images = SamImageProcessor(
            size={"longest_edge": side}, pad_size={"height": side, "width": side}
        )
        self.processor: Any = SamProcessor(images)

    def preprocess(self, image: np.ndarray, points: np.ndarray) -> Any:
        """The image resized, normalised and padded, and points (x, y) [P, T, 2] in its frame."""
        return self.processor(
            images=image,
            input_points=points[None].tolist(),
            input_labels=np.ones((1, *points.shape[:-1]), int).tolist(),
            return_tensors="pt",
            device=str(self.device),
        )

    @torch.inference_mode()
    def encode(self, inputs: Any) -> Tensor:
        """The image's features."""
        pixels = inputs["pixel_values"].to(self.device, self.dtype)
        return self.model.get_image_embeddings(pixels)

    @torch.inference_mode()
    def decode(self, inputs: Any, features: Tensor) -> Any:
        """Low-resolution logits and predicted IoU of three masks a prompt."""
        return self.model(
            image_embeddings=features,
            input_points=inputs["input_points"].to(self.device),
            input_labels=inputs["input_labels"].to(self.device),
        )

    @torch.inference_mode()
    def upscale(self, inputs: Any, decoded: Any) -> np.ndarray:
        """Boolean masks [P, K, height, width] on the host."""
        sizes = inputs["original_sizes"], inputs["reshaped_input_sizes"]
        (masks,) = self.processor.post_process_masks(decoded.pred_masks, *sizes)
        return masks.cpu().numpy()

    def predict(
        self, image: np.ndarray, points: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """What `SamPredictor.predict` returns, from the image on."""
        inputs = self.preprocess(image, points)
        decoded = self.decode(inputs, self.encode(inputs))
        masks = self.upscale(inputs, decoded)
        iou, logits = (x[0].float().cpu().numpy() for x in (decoded.iou_scores, decoded.pred_masks))
        return masks, iou, logits


def build(model: str, implementation: str, dtype: str, runs: int) -> Program:
    """A predictor that has predicted; its output is the logits of all prompts."""
    predictor = Predictor(model, implementation, dtype)
    device, size = predictor.device, image_size(model)
    image = shapes.random_image(*size)
    prompts = {count: shapes.diagonal_points(count, *size) for count in PROMPTS}
    start = time.perf_counter()
    logits = predictor.predict(image, prompts[max(PROMPTS)])[2]
    first_run_s = time.perf_counter() - start
    resized = predictor.preprocess(image, prompts[1])["pixel_values"]
    resizer = type(predictor.processor.image_processor).__name__
    if device.type == "cuda":
        torch.cuda.empty_cache()  # others wait for their turn on the same GPU

    def median_ms(part: Callable[[], Any]) -> float:
        def call() -> None:
            part()
            if device.type == "cuda":
                torch.cuda.synchronize()

        call()
        return Spread.of([time_ms(call) for _ in range(runs)]).median_ms

    def of_prompts(points: np.ndarray) -> Record:
        predictor.predict(image, points)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        total = Spread.of([time_ms(lambda: predictor.predict(image, points)) for _ in range(runs)])
        peak = memory(device)
        inputs = predictor.preprocess(image, points)
        features = predictor.encode(inputs)
        decoded = predictor.decode(inputs, features)
        parts = {
            "preprocess": median_ms(lambda: predictor.preprocess(image, points)),
            "encoder": median_ms(lambda: predictor.encode(inputs)),
            "decoder": median_ms(lambda: predictor.decode(inputs, features)),
            "upscale": median_ms(lambda: predictor.upscale(inputs, decoded)),
        }
        return row(len(points), total, parts) | peak

    notes = {
        "compile_s": first_run_s if "compile" in implementation else None,
        "first_run_s": first_run_s,
        "device": device_name(device),
        "what": f"{PEERS[implementation]}; preprocess is {resizer} on the {resized.device.type}, "
        f"upscale runs on the {device.type}",
    }
    return Program(
        logits, lambda: {"several": [of_prompts(points) for points in prompts.values()]}, notes
    )
