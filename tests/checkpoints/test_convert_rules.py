"""Recognition of sizes by shapes, and the rules as a bijection."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import checkpoint_files
import numpy as np
import pytest
import torch
from checkpoint_files import DTYPES, TINY, meta_shapes, same_bits, save_meta
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsesam_jax.checkpoints import ConversionError, convert_checkpoint, native, rules
from sparsesam_jax.checkpoints.recognise import recognise
from sparsesam_jax.config import PRESETS, ImageEncoderConfig, SamConfig

TINY_HQ = dataclasses.replace(TINY, hq=True)


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("hq", [False, True], ids=["sam", "hq"])
def test_recognises_the_presets_by_their_shapes(name: str, hq: bool):
    config = dataclasses.replace(PRESETS[name], hq=hq)
    assert recognise(meta_shapes(config)) == config


def with_encoder(config: SamConfig, **fields: Any) -> SamConfig:
    return dataclasses.replace(
        config, image_encoder=dataclasses.replace(config.image_encoder, **fields)
    )


@pytest.mark.parametrize("blocks", [(), (0, 1, 2)], ids=["windows", "global"])
def test_says_so_where_shapes_are_ambiguous(tmp_path: Path, blocks: tuple[int, ...]):
    config = with_encoder(TINY, window_size=3, global_attn_indexes=blocks)
    save_meta(tmp_path / "a.pth", config)
    with pytest.raises(ConversionError, match=r"ambiguous: .* have 5 rows"):
        convert_checkpoint(tmp_path / "a.pth", tmp_path / "a.safetensors")
    assert not (tmp_path / "a.safetensors").exists()
    folder = tmp_path / "hf"
    convert_checkpoint(tmp_path / "a.pth", folder, to="huggingface", config=config)
    # Here config.json tells.
    assert convert_checkpoint(folder, tmp_path / "a.safetensors") == config


@pytest.mark.parametrize("file", ["b.pth", "b.safetensors"])
def test_files_written_here_say_what_tensors_do_not(tmp_path: Path, file: str):
    """Four heads in the decoder, and blocks that are global or have windows of the whole grid."""
    config = with_encoder(TINY, window_size=3, global_attn_indexes=(1,))
    config = dataclasses.replace(config, decoder_num_heads=4)
    state = save_meta(tmp_path / "a.pth", config)
    form = "meta" if file == "b.pth" else "huggingface"
    convert_checkpoint(tmp_path / "a.pth", tmp_path / file, to=form, config=config)
    assert convert_checkpoint(tmp_path / file, tmp_path / "c.pth") == config
    again = torch.load(tmp_path / "c.pth", weights_only=True)
    assert same_bits(state, again)
    with pytest.raises(ConversionError, match="must have the given config"):
        convert_checkpoint(tmp_path / file, tmp_path / "d.pth", config=TINY)
    again._metadata[""][native.CONFIG_KEY] = "{}"
    torch.save(again, tmp_path / "broken.pth")
    with pytest.raises(ConversionError, match=r"broken\.pth"):
        convert_checkpoint(tmp_path / "broken.pth", tmp_path / "d.pth")


def test_a_given_config_must_be_the_files(tmp_path: Path):
    save_meta(tmp_path / "a.pth")
    other = dataclasses.replace(TINY, decoder_num_heads=2)
    convert_checkpoint(tmp_path / "a.pth", tmp_path / "a.safetensors", config=other)
    assert native.read(tmp_path / "a.safetensors")[0] == other
    with pytest.raises(ConversionError, match="must have the given config"):
        convert_checkpoint(tmp_path / "a.safetensors", tmp_path / "b.pth", config=TINY)
    with pytest.raises(ConversionError, match=r"1 unknown|missing"):
        convert_checkpoint(tmp_path / "a.pth", tmp_path / "b.pth", config=TINY_HQ)


def test_heads_that_do_not_divide_the_width_are_refused():
    shapes = meta_shapes(TINY)
    for name, shape in shapes.items():
        if "rel_pos" in name:
            shapes[name] = (shape[0], 5)
    with pytest.raises(ConversionError, match="number of heads cannot be told: width 12"):
        recognise(shapes)


@st.composite
def configs(draw: st.DrawFn, *, deepest: int = 14) -> SamConfig:
    depth = draw(st.integers(1, deepest))
    heads, grid = draw(st.integers(1, 5)), draw(st.integers(2, 9))
    width = heads * draw(st.integers(1, 9))
    blocks = draw(st.sets(st.integers(0, depth - 1), max_size=depth - 1))
    encoder = ImageEncoderConfig(
        embed_dim=width,
        depth=depth,
        num_heads=heads,
        global_attn_indexes=tuple(sorted(blocks)),
        image_size=grid * (patch := draw(st.integers(1, 5))),
        patch_size=patch,
        window_size=draw(st.integers(1, 15).filter(lambda window: window != grid)),
        mlp_ratio=draw(st.integers(1, 60)) / width,
        out_chans=16 * draw(st.integers(1, 2)),
    )
    return SamConfig(
        image_encoder=encoder,
        mask_in_chans=4 * draw(st.integers(1, 3)),
        num_multimask_outputs=draw(st.integers(1, 12)),
        decoder_depth=draw(st.integers(1, 3)),
        decoder_mlp_dim=draw(st.integers(1, 20)),
        iou_head_depth=draw(st.integers(2, 12)),
        iou_head_hidden_dim=draw(st.integers(1, 20)),
        hq=draw(st.booleans()),
    )


@settings(max_examples=25, deadline=None)
@given(configs())
def test_names_and_sizes_are_a_bijection(config: SamConfig):
    shapes = meta_shapes(config)
    native, huggingface = set(), set()
    renames = rules.huggingface_rules(config.iou_head_depth)
    for name, shape in shapes.items():
        expected, axes = checkpoint_files.native_of(name, shape)
        target, transform = rules.forward(rules.META_RULES, name) or ("", "")
        assert target == expected
        assert rules.backward(rules.META_RULES, target) == (name, transform)
        array = np.broadcast_to(np.float32(0), shape)
        jax_shape = rules.to_jax(array, transform).shape
        assert jax_shape == tuple(shape[axis] for axis in axes)
        assert rules.torch_shape(jax_shape, transform) == shape
        other = rules.backward(renames, name)
        assert other is not None and rules.forward(renames, other[0]) == (name, "same")
        native.add(target)
        huggingface.add(other[0])
    assert len(native) == len(huggingface) == len(shapes)
    found = recognise(shapes)
    assert found.image_encoder.mlp_dim == config.image_encoder.mlp_dim
    assert with_encoder(found, mlp_ratio=config.image_encoder.mlp_ratio) == config


@settings(max_examples=3, deadline=None)
@given(config=configs(deepest=3), dtype=st.sampled_from(list(DTYPES)))
def test_files_go_round_all_formats_and_keep_every_bit(
    tmp_path_factory: pytest.TempPathFactory, config: SamConfig, dtype: str
):
    folder = tmp_path_factory.mktemp("files")
    state = save_meta(folder / "a.pth", config, dtype=DTYPES[dtype])
    convert_checkpoint(folder / "a.pth", folder / "hf", to="huggingface")
    convert_checkpoint(folder / "hf", folder / "b.safetensors")
    convert_checkpoint(folder / "b.safetensors", folder / "b.pth")
    assert same_bits(state, torch.load(folder / "b.pth", weights_only=True))


def test_every_name_fits_one_rule_at_most():
    for config in (TINY_HQ, PRESETS["vit_h"]):
        for name in meta_shapes(config):
            assert sum(rules.matches(rule.source, name) for rule in rules.META_RULES) == 1
            renames = rules.huggingface_rules(config.iou_head_depth)
            assert sum(rules.matches(rule.target, name) for rule in renames) == 1
    for stray in (
        "image_encoder.blocks.01.norm1.weight",
        "image_encoder.blocks.1.norm3.weight",
        "image_encoder.blocks.1.attn.qkv.weight.",
        "image_encoder_blocks.1.norm1.weight",
        "image_encoder.neck.0.bias",
    ):
        assert rules.forward(rules.META_RULES, stray) is None
