"""A tuned model goes back to PyTorch: Meta's package and transformers find the same masks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from meta_sam import import_meta, meta_sam
from tuning_cases import SIDE, discs, settings, tiny_sam, write_discs

from sparsesam_jax import SamPredictor
from sparsesam_jax.tuning.data import find, load
from sparsesam_jax.tuning.lora import add_lora, merge_lora
from sparsesam_jax.tuning.run import tune


@pytest.mark.parametrize("rank", [0, 2])
def test_masks_are_the_same_to_the_pixel(tmp_path: Path, rank: int):
    import transformers

    images, masks = write_discs(tmp_path, 4)
    sam, train = tiny_sam(tmp_path), ("all",)
    if rank:
        sam, train = add_lora(sam, rank), ("lora", "decoder")
    photos = load(find(images, masks=masks), SIDE)
    tuned = merge_lora(tune(sam, photos, settings(train=train, steps=4), tmp_path / "run"))
    tuned.save_pretrained(tmp_path / "tuned", format="huggingface")
    photo, box = discs(1)[0].image, np.array([6.0, 4.0, 30.0, 33.0])
    predictor = SamPredictor(tuned)
    predictor.set_image(photo)
    expected, _, _ = predictor.predict(box=box)
    assert 0 < expected.mean() < 1

    model = meta_sam(tmp_path / "run" / "model.safetensors", tmp_path)
    meta = import_meta().SamPredictor(model)
    meta.set_image(photo)
    found, _, _ = meta.predict(box=box)
    assert np.count_nonzero(found != expected) == 0

    processor = transformers.SamProcessor.from_pretrained(tmp_path / "tuned")
    model = transformers.SamModel.from_pretrained(tmp_path / "tuned").eval()
    inputs = processor(photo, input_boxes=[[box.tolist()]], return_tensors="pt")
    with torch.no_grad():
        outputs = model(**inputs)
    sizes = inputs["original_sizes"], inputs["reshaped_input_sizes"]
    found = processor.post_process_masks(outputs.pred_masks, *sizes)[0][0].numpy()
    assert np.count_nonzero(found != expected) == 0
