"""What only a GPU shows of the predictor: programs at SAM's size, and memory of many prompts."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from sparsesam_jax import Sam, SamPredictor

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def sam() -> Sam:
    return Sam.from_pretrained("vit_t", dtype="bfloat16")


def test_photos_of_all_sizes_share_twelve_programs(sam: Sam):
    compiled: list[str] = []

    def count(event: str, _seconds: float, **_details: str) -> None:
        if event.endswith("backend_compile_duration"):
            compiled.append(event)

    jax.clear_caches()
    jax.monitoring.register_event_duration_secs_listener(count)
    predictor = SamPredictor(sam, transforms="device")
    rng = np.random.default_rng(0)
    sizes = [*rng.integers(100, 4000, (60, 2)).tolist(), [4000, 4000], [100, 100], [4000, 100]]
    for height, width in sizes:
        predictor.set_image(rng.integers(0, 256, (height, width, 3), np.uint8))
        masks, _, _ = predictor.predict(box=np.array([0, 0, width, height]))
        assert masks.shape == (3, height, width)
    assert 8 <= len(compiled) <= 12


def test_a_thousand_boxes_take_two_gibibytes(sam: Sam):
    predictor = SamPredictor(sam)
    rng = np.random.default_rng(0)
    predictor.set_image(rng.integers(0, 256, (1200, 1800, 3), np.uint8))
    low = rng.uniform(0, 1000, (1000, 2))
    boxes = np.concatenate([low, low + rng.uniform(20, 200, (1000, 2))], 1)
    device = jax.devices()[0]
    # A peak never falls, so that all that was before counts as none of the boxes'.
    before = device.memory_stats()["bytes_in_use"]
    masks, scores, _ = predictor.predict(box=boxes, multimask_output=False, mask_format="packed")
    assert masks.shape == (1000, 1, 1200, 225) and scores.shape == (1000, 1)
    assert device.memory_stats()["peak_bytes_in_use"] - before <= 2 * 2**30
