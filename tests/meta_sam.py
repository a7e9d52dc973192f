"""Meta's own package as an oracle: `segment_anything` from PyPI with weights of this project."""

from __future__ import annotations

import importlib.util
import sys
import types
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from sparsesam_jax.checkpoints import convert_checkpoint, native


def _nms(boxes: torch.Tensor, scores: torch.Tensor, iou_threshold: float) -> torch.Tensor:
    """torchvision's non-maximum suppression: places of the boxes that stay, best first."""
    kept: list[int] = []
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    order = torch.argsort(scores, descending=True, stable=True).tolist()
    while order:
        best = order.pop(0)
        kept.append(best)
        rest = torch.tensor(order, dtype=torch.long)
        low = torch.maximum(boxes[best, :2], boxes[rest, :2])
        high = torch.minimum(boxes[best, 2:], boxes[rest, 2:])
        common = (high - low).clamp(min=0).prod(1)
        iou = common / (area[best] + area[rest] - common)
        order = [
            place
            for place, value in zip(order, iou.tolist(), strict=True)
            if not value > iou_threshold
        ]
    return torch.tensor(kept, dtype=torch.long)


def _stub_torchvision() -> None:
    """The four functions of torchvision that Meta's package takes, for it is a large dependency."""
    boxes = types.ModuleType("torchvision.ops.boxes")
    boxes.batched_nms = lambda b, s, _classes, iou_threshold: _nms(b, s, iou_threshold)  # pyright: ignore
    boxes.box_area = lambda b: (b[:, 2] - b[:, 0]) * (b[:, 3] - b[:, 1])  # pyright: ignore
    functional = types.ModuleType("torchvision.transforms.functional")
    functional.to_pil_image = Image.fromarray  # pyright: ignore
    functional.resize = lambda image, size: image.resize(size[::-1], Image.Resampling.BILINEAR)  # pyright: ignore
    for name in ("torchvision", "torchvision.ops", "torchvision.transforms"):
        sys.modules.setdefault(name, types.ModuleType(name))
    sys.modules["torchvision.ops.boxes"] = boxes
    sys.modules["torchvision.transforms.functional"] = functional


def import_meta() -> Any:
    """The package `segment_anything`, whether or not torchvision is there."""
    known = set(sys.modules)
    if importlib.util.find_spec("torchvision") is None:
        _stub_torchvision()
    import segment_anything
    import segment_anything.automatic_mask_generator

    # transformers looks for torchvision, and must not find the stub.
    for name in set(sys.modules) - known:
        if name.startswith("torchvision"):
            del sys.modules[name]
    return segment_anything


def meta_sam(weights: Path, folder: Path) -> Any:
    """Meta's `Sam` with a weights file's parameters, converted to Meta's checkpoint."""
    meta = import_meta()
    from segment_anything import modeling

    config = native.read(weights)[0]
    encoder, channels = config.image_encoder, config.image_encoder.out_chans
    path = folder / f"{weights.stem}.pth"
    convert_checkpoint(weights, path, dtype="float32")
    grid = (encoder.grid_size, encoder.grid_size)
    sam = modeling.Sam(
        image_encoder=modeling.ImageEncoderViT(
            img_size=encoder.image_size,
            patch_size=encoder.patch_size,
            embed_dim=encoder.embed_dim,
            depth=encoder.depth,
            num_heads=encoder.num_heads,
            mlp_ratio=encoder.mlp_ratio,
            out_chans=channels,
            norm_layer=partial(torch.nn.LayerNorm, eps=1e-6),
            use_rel_pos=True,
            window_size=encoder.window_size,
            global_attn_indexes=encoder.global_attn_indexes,
        ),
        prompt_encoder=modeling.PromptEncoder(
            embed_dim=channels,
            image_embedding_size=grid,
            input_image_size=(encoder.image_size, encoder.image_size),
            mask_in_chans=config.mask_in_chans,
        ),
        mask_decoder=modeling.MaskDecoder(
            num_multimask_outputs=config.num_multimask_outputs,
            transformer=modeling.TwoWayTransformer(
                depth=config.decoder_depth,
                embedding_dim=channels,
                mlp_dim=config.decoder_mlp_dim,
                num_heads=config.decoder_num_heads,
            ),
            transformer_dim=channels,
            iou_head_depth=config.iou_head_depth,
            iou_head_hidden_dim=config.iou_head_hidden_dim,
        ),
    )
    sam.load_state_dict(torch.load(path, weights_only=True))
    assert meta is not None
    return sam.eval()


def mask_iou(a: np.ndarray, b: np.ndarray) -> float:
    """IoU of two boolean masks; two empty masks are equal."""
    union = (a | b).sum()
    return 1.0 if union == 0 else float((a & b).sum() / union)
