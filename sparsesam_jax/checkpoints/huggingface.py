"""What Hugging Face's SamModel and SamHQModel have beside tensors: their folders' JSON files."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sparsesam_jax.checkpoints.atomic import atomic_path
from sparsesam_jax.checkpoints.errors import ConversionError
from sparsesam_jax.checkpoints.native import CONFIG_KEY, TensorSpec, write_safetensors
from sparsesam_jax.checkpoints.recognise import Hints
from sparsesam_jax.checkpoints.sources import CONFIG_NAME, INDEX_NAME, MODEL_NAME
from sparsesam_jax.config import SamConfig

PREPROCESSOR_NAME = "preprocessor_config.json"

_MODEL_TYPES = ("sam", "sam_hq")
# Transformers refuses a safetensors file without it.
_METADATA = {"format": "pt"}
# Meta's decoder has 1e-5. The published files say 1e-6, which this project does not follow.
_DECODER_EPS = ("mask_decoder_config", "layer_norm_eps")


def describe(config: SamConfig) -> dict[str, Any]:
    """The config.json that makes transformers build the same model."""
    encoder = config.image_encoder
    prompt = {
        "hidden_act": "gelu",
        "hidden_size": encoder.out_chans,
        "image_embedding_size": encoder.grid_size,
        "image_size": encoder.image_size,
        "layer_norm_eps": 1e-6,
        "mask_input_channels": config.mask_in_chans,
        "num_point_embeddings": 4,
        "patch_size": encoder.patch_size,
    }
    decoder = {
        "attention_downsample_rate": 2,
        "hidden_act": "relu",
        "hidden_size": encoder.out_chans,
        "iou_head_depth": config.iou_head_depth,
        "iou_head_hidden_dim": config.iou_head_hidden_dim,
        "layer_norm_eps": 1e-5,
        "mlp_dim": config.decoder_mlp_dim,
        "num_attention_heads": config.decoder_num_heads,
        "num_hidden_layers": config.decoder_depth,
        "num_multimask_outputs": config.num_multimask_outputs,
    }
    vision = {
        "global_attn_indexes": sorted(encoder.global_attn_indexes),
        "hidden_act": "gelu",
        "hidden_size": encoder.embed_dim,
        "image_size": encoder.image_size,
        "layer_norm_eps": 1e-6,
        "mlp_dim": encoder.mlp_dim,
        "num_attention_heads": encoder.num_heads,
        "num_channels": 3,
        "num_hidden_layers": encoder.depth,
        "num_pos_feats": encoder.out_chans // 2,
        "output_channels": encoder.out_chans,
        "patch_size": encoder.patch_size,
        "qkv_bias": True,
        "use_abs_pos": True,
        "use_rel_pos": True,
        "window_size": encoder.window_size,
    }
    return {
        "architectures": ["SamHQModel" if config.hq else "SamModel"],
        "model_type": _MODEL_TYPES[config.hq],
        "mask_decoder_config": decoder | ({"vit_dim": encoder.embed_dim} if config.hq else {}),
        "prompt_encoder_config": prompt,
        "vision_config": vision,
    }


def describe_preprocessing(config: SamConfig) -> dict[str, Any]:
    """The preprocessor_config.json that makes transformers prepare photos for the model."""
    side, low = config.image_encoder.image_size, 4 * config.image_encoder.grid_size
    return {
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_pad": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.485, 0.456, 0.406],
        "image_processor_type": "SamImageProcessor",
        "image_std": [0.229, 0.224, 0.225],
        "mask_pad_size": {"height": low, "width": low},
        "mask_size": {"longest_edge": low},
        "pad_size": {"height": side, "width": side},
        "processor_class": "SamHQProcessor" if config.hq else "SamProcessor",
        "resample": 2,  # bilinear, in Pillow's count
        "rescale_factor": 1 / 255,
        "size": {"longest_edge": side},
    }


def hints(huggingface_config: Mapping[str, Any]) -> Hints:
    """What a config.json says that shapes may not.

    Raises:
        ConversionError: It is another model's.
    """
    model_type = huggingface_config.get("model_type")
    if model_type not in _MODEL_TYPES:
        raise ConversionError(
            f"{CONFIG_NAME} must have model_type {' or '.join(_MODEL_TYPES)}, got {model_type!r}"
        )
    vision = _section(huggingface_config, "vision_config")
    decoder = _section(huggingface_config, "mask_decoder_config")
    # What a config.json leaves out has transformers' default.
    window_size = vision.get("window_size", 14)
    global_blocks = vision.get("global_attn_indexes", [2, 5, 8, 11])
    num_heads = decoder.get("num_attention_heads", 8)
    try:
        return Hints(
            attention=(int(window_size), tuple(sorted(int(block) for block in global_blocks))),
            decoder_num_heads=int(num_heads),
        )
    except (TypeError, ValueError) as error:
        raise ConversionError(
            f"{CONFIG_NAME} must have whole numbers for window_size, global_attn_indexes and "
            f"num_attention_heads, got {window_size!r}, {global_blocks!r} and {num_heads!r}"
        ) from error


def differences(huggingface_config: Mapping[str, Any], config: SamConfig) -> list[str]:
    """Where a config.json describes another model than its tensors do."""
    found = []
    for section, fields in describe(config).items():
        if not isinstance(fields, dict):
            continue
        theirs = _section(huggingface_config, section)
        for field, expected in fields.items():
            got = theirs.get(field)
            # A field that is null or left out follows from the others or has its default.
            if got is None or (section, field) == _DECODER_EPS:
                continue
            if got != expected and not _same(got, expected):
                found.append(f"{section}.{field}: expected {expected!r}, got {got!r}")
    return found


def write(
    path: Path,
    config: SamConfig,
    tensors: Mapping[str, TensorSpec],
    load: Callable[[str], np.ndarray],
) -> None:
    """Write a folder that transformers loads, or the tensors alone where `path` is a .safetensors.

    Args:
        path: Folder, made where it does not exist, or file.
        config: Shape of the model.
        tensors: Shape and dtype by Hugging Face's name.
        load: Returns the named tensor's array.
    """
    if path.suffix == ".safetensors":
        metadata = _METADATA | {CONFIG_KEY: config.to_json()}
        write_safetensors(path, metadata, tensors, load)
        return
    if (path / INDEX_NAME).exists():
        raise ConversionError(f"{path} already has a checkpoint in shards; choose another folder")
    made = not path.exists()
    path.mkdir(exist_ok=True)
    try:
        # All get their names only when all are whole.
        with (
            atomic_path(path / CONFIG_NAME) as model,
            atomic_path(path / PREPROCESSOR_NAME) as preprocessor,
        ):
            _write_json(model, describe(config))
            _write_json(preprocessor, describe_preprocessing(config))
            write_safetensors(path / MODEL_NAME, _METADATA, tensors, load)
    except BaseException:
        if made:
            with contextlib.suppress(OSError):
                path.rmdir()
        raise


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _section(huggingface_config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    section = huggingface_config.get(name)
    if section is None:
        return {}
    if not isinstance(section, dict):
        raise ConversionError(f"{CONFIG_NAME} must have an object {name}, got {section!r}")
    return section


def _same(got: Any, expected: Any) -> bool:
    if isinstance(got, list) and isinstance(expected, list):
        return sorted(got) == expected  # the order of blocks says nothing
    return got == [expected, expected]  # a size may be given for each side
