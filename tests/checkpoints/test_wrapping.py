"""Checkpoints as training code leaves them: prefixes, wrappers, and what lies beside the model."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_files import TINY, meta_state, same_bits
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from sparsesam_jax.checkpoints import ConversionError, convert_checkpoint
from sparsesam_jax.checkpoints.wrapping import unwrap

State = dict[str, torch.Tensor]


def prefixed(prefix: str, state: State) -> State:
    return {prefix + name: tensor for name, tensor in state.items()}


def optimizer(state: State) -> dict[str, Any]:
    """As torch.optim saves it: tensors under numbers, and plain numbers."""
    moments = {index: {"exp_avg": tensor, "step": 3} for index, tensor in enumerate(state.values())}
    return {"state": moments, "param_groups": [{"lr": 1e-4, "params": [*moments]}]}


def compiled_encoder(state: State) -> State:
    """As `sam.image_encoder = torch.compile(sam.image_encoder)` leaves it."""
    return {k.replace("image_encoder.", "image_encoder._orig_mod."): v for k, v in state.items()}


def by_module(state: State) -> dict[str, State]:
    roots = {name.split(".")[0] for name in state}
    return {
        root: {k.removeprefix(f"{root}."): v for k, v in state.items() if k.startswith(root)}
        for root in roots
    }


PREFIXES = ("model.", "sam.", "net.model.", "_orig_mod.", "module._orig_mod.", "module.", "a.b.c.")
WRAPPERS = ("model", "state_dict", "model_state", "net", "sam", "params", "weights", "anything")
CONSTANTS = ("pixel_mean", "pixel_std")
OTHER = {"decoder.0.weight": torch.zeros(3), "out_conv.bias": torch.zeros(2)}

# How a state dict is wrapped -> what the log must name.
WRAPPED: dict[str, tuple[Callable[[State], Any], list[str]]] = {
    **{prefix: (lambda s, p=prefix: prefixed(p, s), [repr(prefix)]) for prefix in PREFIXES},
    **{key: (lambda s, k=key: {k: s}, [f"'{key}.'"]) for key in WRAPPERS},
    "lightning": (
        lambda s: {"epoch": 3, "state_dict": prefixed("sam.", s), "hyper": {"lr": 1e-4}},
        ["'state_dict.sam.'", "epoch", "hyper"],
    ),
    "micro-sam": (
        lambda s: {"model_state": s, "decoder_state": OTHER, "iteration": 7},
        ["'model_state.'", "decoder_state", "iteration"],
    ),
    "training": (
        lambda s: {"model": {"state_dict": prefixed("module.", s)}, "optimizer": optimizer(s)},
        ["'model.state_dict.module.'", "optimizer"],
    ),
    "by module": (lambda s: by_module(s) | {"optimizer": optimizer(s)}, ["optimizer"]),
    "compiled encoder": (compiled_encoder, ["_orig_mod"]),
    "wrapped blocks": (
        lambda s: {
            k.replace("blocks.1.", "blocks.1._checkpoint_wrapped_module."): v for k, v in s.items()
        },
        ["_checkpoint_wrapped_module"],
    ),
    "constants": (
        lambda s: prefixed(
            "module.", s | {"pixel_mean": torch.zeros(3), "pixel_std": torch.ones(3)}
        ),
        ["'module.'", *CONSTANTS],
    ),
    "number beside": (lambda s: s | {"epoch": 3}, ["epoch"]),
    "same dict twice": (lambda s: {"model": s, "state_dict": s}, ["'model.'"]),
}


@pytest.mark.parametrize(("wrap", "named"), WRAPPED.values(), ids=WRAPPED)
def test_a_wrapped_state_dict_is_read_and_what_was_stripped_is_named(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    wrap: Callable[[State], Any],
    named: list[str],
):
    state = meta_state(TINY)
    torch.save(wrap(state), tmp_path / "a.pth")
    assert convert_checkpoint(tmp_path / "a.pth", tmp_path / "b.pth") == TINY
    assert same_bits(state, torch.load(tmp_path / "b.pth", weights_only=True))
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    for text in (str(tmp_path / "a.pth"), *named):
        assert text in record.getMessage()


def test_a_plain_state_dict_says_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    torch.save(meta_state(TINY), tmp_path / "a.pth")
    convert_checkpoint(tmp_path / "a.pth", tmp_path / "b.pth")
    assert not caplog.records


@pytest.mark.parametrize(
    ("wrap", "named"),
    [
        (lambda s: prefixed("module.", s), "'module.'"),
        (lambda s: s | {"pixel_mean": torch.zeros(3, 1, 1)}, "pixel_mean"),
    ],
    ids=["prefix", "constants"],
)
def test_safetensors_are_unwrapped_as_well(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, wrap: Callable[[State], State], named: str
):
    state = meta_state(TINY)
    save_file(wrap(state), tmp_path / "a.safetensors")
    convert_checkpoint(tmp_path / "a.safetensors", tmp_path / "b.pth")
    assert same_bits(state, torch.load(tmp_path / "b.pth", weights_only=True))
    assert named in caplog.text


@pytest.mark.parametrize("tied", ["both", "first", "second"])
def test_hugging_faces_names_may_have_a_prefix(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, tied: str
):
    torch.save(meta_state(TINY), tmp_path / "a.pth")
    convert_checkpoint(tmp_path / "a.pth", tmp_path / "hf", to="huggingface")
    path = tmp_path / "hf" / "model.safetensors"
    tensors = load_file(path)
    first = "shared_image_embedding.positional_embedding"
    second = "prompt_encoder.shared_embedding.positional_embedding"
    if tied != "first":
        tensors[second] = tensors[first].clone()
    if tied == "second":
        del tensors[first]
    save_file(prefixed("model.", tensors), path)
    convert_checkpoint(tmp_path / "hf", tmp_path / "b.pth")
    assert same_bits(meta_state(TINY), torch.load(tmp_path / "b.pth", weights_only=True))
    assert "'model.'" in caplog.text


@pytest.mark.parametrize(
    ("wrap", "message"),
    [
        (
            lambda s: {"model": s, "ema": meta_state(TINY, seed=1)},
            r"several places \(182 under 'model\.', 182 under 'ema\.'\); save one state dict alone",
        ),
        (
            lambda s: prefixed("student.", s) | prefixed("teacher.", s),
            r"182 under 'student\.', 182 under 'teacher\.'",
        ),
        (
            lambda s: {"model": s, "old": {k: v for k, v in s.items() if "mask_decoder" in k}},
            r"182 under 'model\.', \d+ under 'old\.'",
        ),
        (
            lambda s: prefixed("sam.", s) | {"head.weight": torch.zeros(3)},
            r"read without 'sam\.' in its names, does not fit .*: 1 unknown \(head\.weight\)$",
        ),
        (
            lambda s: {"model": s | {"image_encoder.blocks.0.lora.weight": torch.zeros(3)}},
            r"1 unknown \(image_encoder\.blocks\.0\.lora\.weight\)$",
        ),
        (
            lambda s: {"model": {k: v for k, v in s.items() if "norm1" not in k}, "rest": OTHER},
            r"10 missing \(image_encoder\.blocks\.0\.norm1\.bias, .* and 5 more\)$",
        ),
        (
            lambda s: s | prefixed("module.", {"image_encoder.pos_embed": torch.zeros(3)}),
            r"1 duplicate \(image_encoder\.pos_embed\)$",
        ),
        (
            lambda s: {"image_encoder": {"pos_embed": torch.zeros(3)}, **s},
            r"1 named twice \(image_encoder\.pos_embed\)$",
        ),
        (lambda s: {"a": {"b": OTHER}}, r"neither image_encoder\.blocks .* but a\.b\.decoder"),
        (lambda s: {"a": {"b": {}}}, "but no tensor$"),
    ],
)
def test_what_is_no_single_model_is_refused(
    tmp_path: Path, wrap: Callable[[State], Any], message: str
):
    torch.save(wrap(meta_state(TINY)), tmp_path / "a.pth")
    with pytest.raises(ConversionError, match=message) as error:
        convert_checkpoint(tmp_path / "a.pth", tmp_path / "b.pth")
    assert str(error.value).startswith(str(tmp_path / "a.pth"))
    assert len(str(error.value)) < 800
    assert not (tmp_path / "b.pth").exists()


NAMES = [*meta_state(TINY)]
parts = st.text("abcxyz_019", min_size=1, max_size=6)


@given(
    entry=st.lists(parts, max_size=3).map(tuple),
    prefix=st.lists(parts | st.sampled_from(["module", "_orig_mod"]), max_size=3),
    others=st.dictionaries(parts, st.lists(parts, min_size=1, max_size=3, unique=True), max_size=3),
)
def test_any_prefix_in_any_entry_is_found(
    entry: tuple[str, ...], prefix: list[str], others: dict[str, list[str]]
):
    whole = ".".join([*entry, *prefix, ""])
    entries = {(key,): [f"{key}.{name}" for name in names] for key, names in others.items()}
    entries.pop(entry[:1], None)
    left_out = {key for (key,) in entries}
    entries[entry] = [whole + name for name in NAMES]
    found = unwrap(entries)
    assert found.names == {name: whole + name for name in NAMES}
    assert not found.duplicates
    assert {*found.left_out} == left_out
    assert [*found.stripped] == ([whole] if whole else [])


# --- Folders ---


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A Hugging Face folder of a model that shapes alone do not tell: 4 heads in the decoder."""
    state, config = meta_state(TINY), dataclasses.replace(TINY, decoder_num_heads=4)
    torch.save(state, tmp_path / "a.pth")
    convert_checkpoint(tmp_path / "a.pth", tmp_path / "hf", to="huggingface", config=config)
    return tmp_path / "hf"


def as_bin(folder: Path, name: str = "pytorch_model.bin") -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / name)
    (folder / "model.safetensors").unlink()


def as_shards(folder: Path, suffix: str, variant: str = "") -> Path:
    """Two shards and their index, as transformers names them; returns the index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    stem = "model" if suffix == "safetensors" else "pytorch_model"
    write = save_file if suffix == "safetensors" else torch.save
    names, weight_map = [*tensors], {}
    for number, part in enumerate((names[:90], names[90:]), 1):
        file = f"{stem}{variant}-0000{number}-of-00002.{suffix}"
        write({name: tensors[name] for name in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    index = folder / f"{stem}.{suffix}.index{variant}.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return index


FOLDERS: dict[str, Callable[[Path], Any]] = {
    "safetensors": lambda folder: None,
    "bin": as_bin,
    "fp16 bin": lambda folder: as_bin(folder, "pytorch_model.fp16.bin"),
    "fp16": lambda folder: (folder / "model.safetensors").rename(folder / "model.fp16.safetensors"),
    "shards": lambda folder: as_shards(folder, "safetensors"),
    "fp16 shards": lambda folder: as_shards(folder, "safetensors", ".fp16"),
    "bin shards": lambda folder: as_shards(folder, "bin"),
    "beside a trainer's files": lambda folder: (
        as_bin(folder),
        torch.save({"a": 1}, folder / "training_args.bin"),
        torch.save({"a": 1}, folder / "optimizer.pt"),
    ),
}


@pytest.mark.parametrize("change", FOLDERS.values(), ids=FOLDERS)
def test_folders_hold_their_tensors_in_many_ways(
    tmp_path: Path, folder: Path, change: Callable[[Path], Any]
):
    change(folder)
    config = convert_checkpoint(folder, tmp_path / "b.pth")
    assert config.decoder_num_heads == 4
    assert same_bits(meta_state(TINY), torch.load(tmp_path / "b.pth", weights_only=True))


@pytest.mark.parametrize("make", [lambda f: f / "model.safetensors", lambda f: as_shards(f, "bin")])
def test_a_file_of_a_folder_has_the_config_beside_it(
    tmp_path: Path, folder: Path, make: Callable[[Path], Path]
):
    path = make(folder)
    assert convert_checkpoint(path, tmp_path / "b.pth").decoder_num_heads == 4


def test_a_folder_with_metas_file_alone(tmp_path: Path):
    (tmp_path / "folder").mkdir()
    torch.save(meta_state(TINY), tmp_path / "folder" / "sam_vit.pth")
    (tmp_path / "folder" / "config.json").write_text("another program's")
    assert convert_checkpoint(tmp_path / "folder", tmp_path / "b.pth") == TINY


def test_folders_without_one_checkpoint(tmp_path: Path, folder: Path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConversionError, match=r"has no checkpoint: model\.safetensors, pytorch"):
        convert_checkpoint(tmp_path / "empty", tmp_path / "b.pth")
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    for variant in ("bf16", "fp16"):
        save_file(tensors, folder / f"model.{variant}.safetensors")
    several = r"several checkpoints \(model\.bf16\.safetensors, model\.fp16\.safetensors\): name"
    with pytest.raises(ConversionError, match=several):
        convert_checkpoint(folder, tmp_path / "b.pth")
    named = folder / "model.fp16.safetensors"
    assert convert_checkpoint(named, tmp_path / "b.pth").decoder_num_heads == 4
