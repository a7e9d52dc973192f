"""PyTorch peers as the workers run them; the one place of the benchmarks that imports torch."""

from __future__ import annotations

import os

import numpy as np

from benchmarks.worker import Built, Job


def build(job: Job) -> Built:
    """The vision encoder of transformers' SamModel, float32, in inference mode."""
    import torch
    from transformers import SamModel
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.set_num_threads(job.threads)
    model = SamModel.from_pretrained(
        job.weights,
        attn_implementation=job.implementation,
        dtype=torch.float32,
        local_files_only=True,
    )
    encoder = model.vision_encoder.eval()
    # PyTorch's layout; contiguous, as its image processor hands the pixels over.
    pixels = torch.from_numpy(np.load(job.pixels)).permute(0, 3, 1, 2).contiguous()

    def call() -> torch.Tensor:
        with torch.inference_mode():
            return encoder(pixels).last_hidden_state

    return Built(
        call=call,
        features=lambda features: features.permute(0, 2, 3, 1).numpy(),
        compile_s=None,
        notes={
            "attention": type(encoder.layers[0].attn).__name__,
            "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY"),
        },
    )
