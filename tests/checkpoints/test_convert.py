"""Conversion: values, names and sizes in every direction, and what it refuses."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any, get_args

import checkpoint_files
import numpy as np
import pytest
import torch
from checkpoint_files import DTYPES, TINY, meta_shapes, meta_state, same_bits, save_meta
from safetensors.torch import load_file, save_file

from sparsesam_jax.checkpoints import ConversionError, convert_checkpoint, native
from sparsesam_jax.choices import Dtype
from sparsesam_jax.config import SamConfig

TINY_HQ = dataclasses.replace(TINY, hq=True)


def save_huggingface(folder: Path, *, hq: bool = False, **options: Any) -> dict[str, torch.Tensor]:
    """What transformers itself writes for a small model of random weights; returns its tensors."""
    import transformers

    vision = {
        **{"hidden_size": 12, "num_hidden_layers": 3, "num_attention_heads": 3, "mlp_ratio": 2.0},
        **{"image_size": 24, "patch_size": 8, "window_size": 2, "global_attn_indexes": [1]},
        **{"output_channels": 16, "num_pos_feats": 8},
    }
    prompt = {"hidden_size": 16, "image_size": 24, "patch_size": 8, "mask_input_channels": 8}
    decoder = {
        **{"hidden_size": 16, "mlp_dim": 24, "num_attention_heads": 4, "num_multimask_outputs": 2},
        **{"iou_head_hidden_dim": 20, "iou_head_depth": 4},
    }
    sections = {"vision_config": vision, "prompt_encoder_config": prompt}
    if hq:
        sections["mask_decoder_config"] = decoder | {"vit_dim": 12}
        model = transformers.SamHQModel(transformers.SamHQConfig(**sections))
    else:
        sections["mask_decoder_config"] = decoder
        model = transformers.SamModel(transformers.SamConfig(**sections))
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(folder, **options)
    return {name: tensor.contiguous() for name, tensor in model.state_dict().items()}


# What `save_huggingface` makes.
HUGGINGFACE = dataclasses.replace(TINY, decoder_num_heads=4, iou_head_depth=4)
TIED = (
    "shared_image_embedding.positional_embedding",
    "prompt_encoder.shared_embedding.positional_embedding",
)


# --- Meta ---


@pytest.mark.parametrize("config", [TINY, TINY_HQ], ids=["sam", "hq"])
def test_meta_to_native_has_every_value_in_its_place(tmp_path: Path, config: SamConfig):
    state = meta_state(config, finite=True)
    torch.save(state, tmp_path / "sam.pth")
    assert convert_checkpoint(tmp_path / "sam.pth", tmp_path / "sam.safetensors") == config
    read_config, arrays = native.read(tmp_path / "sam.safetensors")
    assert read_config == config
    assert len(arrays) == len(state)
    for key, tensor in state.items():
        name, axes = checkpoint_files.native_of(key, tuple(tensor.shape))
        np.testing.assert_array_equal(arrays[name], tensor.numpy().transpose(axes), err_msg=name)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("config", [TINY, TINY_HQ], ids=["sam", "hq"])
def test_meta_to_native_to_meta_keeps_every_bit(tmp_path: Path, config: SamConfig, dtype: str):
    state = save_meta(tmp_path / "a.pth", config, dtype=DTYPES[dtype])
    convert_checkpoint(tmp_path / "a.pth", tmp_path / "a.safetensors")
    convert_checkpoint(tmp_path / "a.safetensors", tmp_path / "b.pth")
    assert same_bits(state, torch.load(tmp_path / "b.pth", weights_only=True))


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: {"model": state, "epoch": 3},
        lambda state: {"state_dict": {f"module.{name}": state[name] for name in state}},
        lambda state: {"model": {"state_dict": state}},
        lambda state: state | {"pixel_mean": torch.zeros(3, 1, 1), "pixel_std": torch.ones(3)},
        lambda state: {name: torch.nn.Parameter(tensor) for name, tensor in state.items()},
        lambda state: {k: v.transpose(0, -1).clone().transpose(0, -1) for k, v in state.items()},
    ],
    ids=["model", "module prefix", "nested", "pixel constants", "parameters", "strided"],
)
def test_reads_the_wrappings_that_training_code_leaves(tmp_path: Path, wrap: Any):
    state = meta_state(TINY)
    torch.save(wrap(state), tmp_path / "a.pth")
    convert_checkpoint(tmp_path / "a.pth", tmp_path / "b.pth")
    assert same_bits(state, torch.load(tmp_path / "b.pth", weights_only=True))


def test_reads_the_file_format_from_before_pytorch_1_6(tmp_path: Path):
    state = meta_state(TINY)
    torch.save(state, tmp_path / "a.pth", _use_new_zipfile_serialization=False)
    convert_checkpoint(tmp_path / "a.pth", tmp_path / "b.pth")
    assert same_bits(state, torch.load(tmp_path / "b.pth", weights_only=True))


def test_an_archive_without_checksums_is_read_and_one_with_wrong_ones_is_not(tmp_path: Path):
    torch.serialization.set_crc32_options(False)
    try:
        save_meta(tmp_path / "a.pth")
    finally:
        torch.serialization.set_crc32_options(True)
    convert_checkpoint(tmp_path / "a.pth", tmp_path / "a.safetensors")
    save_meta(tmp_path / "a.pth")
    content = bytearray((tmp_path / "a.pth").read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "a.pth").write_bytes(content)
    with pytest.raises(ConversionError, match="corrupt"):
        convert_checkpoint(tmp_path / "a.pth", tmp_path / "b.safetensors")


# --- Hugging Face ---


@pytest.mark.parametrize("hq", [False, True], ids=["sam", "hq"])
@pytest.mark.parametrize("shards", [False, True], ids=["one file", "shards"])
def test_huggingface_to_native_to_huggingface_keeps_every_bit(
    tmp_path: Path, hq: bool, shards: bool
):
    options = {"max_shard_size": "20KB"} if shards else {}
    state = save_huggingface(tmp_path / "a", hq=hq, **options)
    assert len(list((tmp_path / "a").glob("*.safetensors"))) == 1 or shards
    config = convert_checkpoint(tmp_path / "a", tmp_path / "a.safetensors")
    assert config == dataclasses.replace(HUGGINGFACE, hq=hq)
    convert_checkpoint(tmp_path / "a.safetensors", tmp_path / "b", to="huggingface")
    back = load_file(tmp_path / "b" / "model.safetensors")
    del state[TIED[1]]
    assert same_bits(state, back)


@pytest.mark.parametrize("hq", [False, True], ids=["sam", "hq"])
def test_transformers_loads_what_becomes_of_metas_checkpoint(tmp_path: Path, hq: bool):
    from transformers import AutoModel

    config = dataclasses.replace(TINY, hq=hq)
    state = save_meta(tmp_path / "a.pth", config)
    convert_checkpoint(tmp_path / "a.pth", tmp_path / "a.safetensors")
    convert_checkpoint(tmp_path / "a.safetensors", tmp_path / "hf", to="huggingface")
    model, info = AutoModel.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not any(info.values()), info
    assert type(model).__name__ == ("SamHQModel" if hq else "SamModel")
    assert model.config.mask_decoder_config.layer_norm_eps == 1e-5
    model.save_pretrained(tmp_path / "again")
    # Straight from one to the other, without a native file between.
    convert_checkpoint(tmp_path / "again", tmp_path / "b.pth")
    assert same_bits(state, torch.load(tmp_path / "b.pth", weights_only=True))


def test_names_that_differ_in_huggingfaces_model(tmp_path: Path):
    state = save_meta(tmp_path / "a.pth", TINY_HQ)
    path = tmp_path / "hf.safetensors"
    convert_checkpoint(tmp_path / "a.pth", path, to="huggingface")
    tensors = load_file(path)
    decoder = "mask_decoder."
    pairs = {
        "vision_encoder.patch_embed.projection.bias": "image_encoder.patch_embed.proj.bias",
        "vision_encoder.layers.2.layer_norm2.weight": "image_encoder.blocks.2.norm2.weight",
        "vision_encoder.neck.conv2.weight": "image_encoder.neck.2.weight",
        "vision_encoder.neck.layer_norm2.bias": "image_encoder.neck.3.bias",
        "prompt_encoder.point_embed.3.weight": "prompt_encoder.point_embeddings.3.weight",
        "prompt_encoder.mask_embed.layer_norm2.weight": "prompt_encoder.mask_downscaling.4.weight",
        "prompt_encoder.mask_embed.conv3.weight": "prompt_encoder.mask_downscaling.6.weight",
        f"{decoder}transformer.layers.1.layer_norm4.weight": (
            f"{decoder}transformer.layers.1.norm4.weight"
        ),
        f"{decoder}upscale_conv2.weight": f"{decoder}output_upscaling.3.weight",
        f"{decoder}iou_prediction_head.proj_out.weight": (
            f"{decoder}iou_prediction_head.layers.2.weight"
        ),
        f"{decoder}output_hypernetworks_mlps.1.layers.0.weight": (
            f"{decoder}output_hypernetworks_mlps.1.layers.1.weight"
        ),
        f"{decoder}hq_token.weight": f"{decoder}hf_token.weight",
        f"{decoder}hq_mask_mlp.proj_in.weight": f"{decoder}hf_mlp.layers.0.weight",
        f"{decoder}compress_vit_norm.weight": f"{decoder}compress_vit_feat.1.weight",
        f"{decoder}encoder_conv2.weight": f"{decoder}embedding_encoder.3.weight",
        f"{decoder}mask_conv1.weight": f"{decoder}embedding_maskfeature.0.weight",
        TIED[0]: "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix",
    }
    for huggingface, meta in pairs.items():
        wanted = checkpoint_files.bits(state[meta])
        assert torch.equal(checkpoint_files.bits(tensors[huggingface]), wanted)


@pytest.mark.parametrize("present", [TIED, TIED[:1], TIED[1:], ()], ids=len)
def test_the_tied_embedding_may_have_either_name_or_both(tmp_path: Path, present: tuple[str, ...]):
    state = save_huggingface(tmp_path / "hf")
    path = tmp_path / "hf.safetensors"
    save_file({k: v.clone() for k, v in state.items() if k not in TIED or k in present}, path)
    if not present:
        with pytest.raises(ConversionError, match=r"1 missing .*shared_image_embedding"):
            convert_checkpoint(path, tmp_path / "a.safetensors", config=HUGGINGFACE)
        return
    convert_checkpoint(path, tmp_path / "a.safetensors", config=HUGGINGFACE)
    _, arrays = native.read(tmp_path / "a.safetensors")
    matrix = arrays["prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"]
    np.testing.assert_array_equal(matrix, state[TIED[0]].numpy())


def test_tied_embeddings_that_differ_are_refused(tmp_path: Path):
    state = {name: tensor.clone() for name, tensor in save_huggingface(tmp_path / "hf").items()}
    state[TIED[1]][0, 0] += 1
    save_file(state, tmp_path / "hf" / "model.safetensors")
    with pytest.raises(ConversionError, match="1 tied but unequal"):
        convert_checkpoint(tmp_path / "hf", tmp_path / "a.safetensors")


def test_a_config_json_of_another_model_is_refused(tmp_path: Path):
    save_huggingface(tmp_path / "hf")
    path = tmp_path / "hf" / "config.json"
    original = json.loads(path.read_text())
    changes = {
        "model_type": ("sam2", "model_type sam or sam_hq, got 'sam2'"),
        "vision_config": (
            original["vision_config"] | {"hidden_act": "relu", "mlp_dim": 25},
            "2 different in config.json .*hidden_act: expected 'gelu', got 'relu'",
        ),
        "mask_decoder_config": ([], "must have an object mask_decoder_config"),
        "prompt_encoder_config": ({"patch_size": 16}, "patch_size: expected 8, got 16"),
    }
    for field, (value, message) in changes.items():
        path.write_text(json.dumps(original | {field: value}))
        with pytest.raises(ConversionError, match=message):
            convert_checkpoint(tmp_path / "hf", tmp_path / "a.safetensors")
    path.write_text("{")
    with pytest.raises(ConversionError, match="is no JSON"):
        convert_checkpoint(tmp_path / "hf", tmp_path / "a.safetensors")


def test_shards_must_be_those_of_their_index(tmp_path: Path):
    save_huggingface(tmp_path / "hf", max_shard_size="20KB")
    index = tmp_path / "hf" / "model.safetensors.index.json"
    original = json.loads(index.read_text())["weight_map"]
    name, file = next(iter(original.items()))
    other = next(shard for shard in original.values() if shard != file)
    for change, message in {
        "../hf/x.safetensors": "files of its own folder",
        "absent.safetensors": "files that are not there: absent.safetensors",
        other: f"1 not in their shard \\({name}\\)",
    }.items():
        index.write_text(json.dumps({"weight_map": original | {name: change}}))
        with pytest.raises(ConversionError, match=message):
            convert_checkpoint(index, tmp_path / "a.safetensors")
    shutil.copy(tmp_path / "hf" / file, tmp_path / "hf" / "copy.safetensors")
    index.write_text(json.dumps({"weight_map": original | {name: "copy.safetensors"}}))
    with pytest.raises(ConversionError, match=r"[0-9]+ in several shards \("):
        convert_checkpoint(index, tmp_path / "a.safetensors")


# --- Dtypes ---


@pytest.mark.parametrize("dtype", get_args(Dtype))
def test_dtype_is_that_which_is_asked_for(tmp_path: Path, dtype: Dtype):
    rng = np.random.default_rng(0)
    state = {
        # Values of float32, as PyTorch itself rounds float64 twice on the way to float16.
        name: torch.from_numpy(rng.standard_normal(shape, np.float32)).double()
        for name, shape in meta_shapes(TINY).items()
    }
    torch.save(state, tmp_path / "a.pth")
    with pytest.raises(ConversionError, match=r"of another dtype than .*: float64"):
        convert_checkpoint(tmp_path / "a.pth", tmp_path / "a.safetensors")
    convert_checkpoint(tmp_path / "a.pth", tmp_path / "a.safetensors", dtype=dtype)
    convert_checkpoint(tmp_path / "a.safetensors", tmp_path / "b.pth")
    expected = {name: tensor.to(DTYPES[dtype]) for name, tensor in state.items()}
    assert same_bits(expected, torch.load(tmp_path / "b.pth", weights_only=True))


def test_values_that_the_dtype_cannot_hold_are_refused(tmp_path: Path):
    state = {name: torch.ones(shape) for name, shape in meta_shapes(TINY).items()}
    state["image_encoder.neck.1.bias"][3] = 1e6
    torch.save(state, tmp_path / "a.pth")
    with pytest.raises(ConversionError, match=r"neck\.1\.bias has values that float16 cannot hold"):
        convert_checkpoint(tmp_path / "a.pth", tmp_path / "a.safetensors", dtype="float16")
    assert [file.name for file in tmp_path.iterdir()] == ["a.pth"]
