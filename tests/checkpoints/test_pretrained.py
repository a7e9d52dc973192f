"""`Sam.from_pretrained` and `Sam.save_pretrained`: every format in, every format out."""

from __future__ import annotations

import dataclasses
import logging
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from checkpoint_files import TINY, meta_shapes, same_bits
from flax import nnx
from models import SMALL, random_weights
from safetensors.torch import load_file

from sparsesam_jax import Sam
from sparsesam_jax.checkpoints import ConversionError, convert_checkpoint, native
from sparsesam_jax.config import SamConfig
from sparsesam_jax.model.transforms import preprocess


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SMALL's random weights in every form that `from_pretrained` takes."""
    folder = tmp_path_factory.mktemp("files")
    path = random_weights(folder / "native.safetensors")
    convert_checkpoint(path, folder / "meta.pth")
    convert_checkpoint(path, folder / "hf", to="huggingface")
    state = torch.load(folder / "meta.pth", weights_only=True)
    torch.save({"model_state": state, "decoder_state": {"a": torch.ones(3)}}, folder / "wrapped.pt")
    torch.save({name: tensor.double() for name, tensor in state.items()}, folder / "double.pth")
    (folder / "bin").mkdir()
    torch.save(load_file(folder / "hf" / "model.safetensors"), folder / "bin" / "pytorch_model.bin")
    (folder / "bin" / "config.json").write_bytes((folder / "hf" / "config.json").read_bytes())
    import transformers

    model = transformers.SamModel.from_pretrained(folder / "hf")
    model.save_pretrained(folder / "shards", max_shard_size="100KB")
    return folder


def parameters(sam: nnx.Module) -> dict[str, np.ndarray]:
    leaves = nnx.to_flat_state(nnx.state(sam))
    return {".".join(map(str, key)): np.asarray(leaf.get_value()) for key, leaf in leaves}


FORMS = (
    *("native.safetensors", "meta.pth", "wrapped.pt", "double.pth"),
    *("hf", "hf/model.safetensors", "bin", "shards", "shards/model.safetensors.index.json"),
)


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_parameters(
    files: Path, form: str, caplog: pytest.LogCaptureFixture
):
    sam = Sam.from_pretrained(files / form)
    assert sam.config == SMALL
    _, arrays = native.read(files / "native.safetensors")
    loaded = parameters(sam)
    assert loaded.keys() == arrays.keys()
    for name, array in loaded.items():
        assert array.dtype == np.float32
        np.testing.assert_array_equal(array, arrays[name], err_msg=name)
    named = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(named) == (form == "wrapped.pt")
    assert all("model_state" in text and "decoder_state" in text for text in named)


def test_parameters_do_not_lie_in_the_file(tmp_path: Path, files: Path):
    """A PyTorch file is mapped into memory; what is loaded must outlive it."""
    path = tmp_path / "a.pth"
    path.write_bytes((files / "meta.pth").read_bytes())
    sam = Sam.from_pretrained(path)
    before = {name: array.copy() for name, array in parameters(sam).items()}
    with open(path, "r+b") as file:
        file.write(bytes(path.stat().st_size))
    for name, array in parameters(sam).items():
        np.testing.assert_array_equal(array, before[name], err_msg=name)


def test_parameters_have_the_dtype_that_is_asked_for(files: Path):
    sam = Sam.from_pretrained(files / "double.pth", dtype=jnp.bfloat16)
    _, arrays = native.read(files / "native.safetensors")
    for name, array in parameters(sam).items():
        np.testing.assert_array_equal(array, arrays[name].astype(jnp.bfloat16), err_msg=name)


def test_a_configuration_may_be_given_where_shapes_leave_it_open(tmp_path: Path):
    encoder = dataclasses.replace(SMALL.image_encoder, window_size=8)
    config = dataclasses.replace(SMALL, image_encoder=encoder, decoder_num_heads=4)
    path = random_weights(tmp_path / "a.safetensors", config)
    convert_checkpoint(path, tmp_path / "b.pth")
    torch.save(dict(torch.load(tmp_path / "b.pth", weights_only=True)), tmp_path / "a.pth")
    with pytest.raises(
        ConversionError, match=r"ambiguous.*give the model's configuration \(config"
    ):
        Sam.from_pretrained(tmp_path / "a.pth")
    assert Sam.from_pretrained(tmp_path / "a.pth", config=config).config == config
    with pytest.raises(ConversionError, match="must have the given config"):
        Sam.from_pretrained(path, config=SMALL)


def test_a_missing_checkpoint_is_named(tmp_path: Path):
    for absent in ("absent.pth", str(tmp_path / "absent"), Path("vit_x")):
        expected = rf"^weights must be .*\(vit_t\) or a checkpoint .* exists, got '{absent}'$"
        with pytest.raises(ValueError, match=expected):
            Sam.from_pretrained(absent)
    with pytest.raises(ConversionError, match=r"absent\.pth does not exist$"):
        convert_checkpoint(tmp_path / "absent.pth", tmp_path / "a.safetensors")


def test_what_is_no_checkpoint_is_said_before_jax_is_imported(tmp_path: Path):
    (tmp_path / "text.pth").write_text("no weights\n" * 9)
    code = (
        "import sys\n"
        "from sparsesam_jax.checkpoints import convert_checkpoint, locate, open_checkpoint\n"
        "for call in (lambda: locate('absent.pth'), lambda: open_checkpoint('text.pth'),\n"
        "             lambda: convert_checkpoint('absent.pth', 'a.safetensors')):\n"
        "    try: call()\n"
        "    except ValueError as error: print(error)\n"
        "assert 'jax' not in sys.modules and 'torch' not in sys.modules\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    assert len(run.stdout.splitlines()) == 3


# --- Values ---


def spoiled(path: Path, values: dict[str, float]) -> Path:
    """SMALL's weights with a value put into some of their tensors."""
    random_weights(path)
    config, arrays = native.read(path)
    for name, value in values.items():
        arrays[name].flat[-1] = value
    native.write(path, config, arrays)
    return path


def test_weights_that_are_not_finite_are_refused_unless_asked_for(tmp_path: Path):
    names = ["image_encoder.blocks.1.attn.qkv.kernel", "mask_decoder.iou_token.embedding"]
    path = spoiled(tmp_path / "a.safetensors", {names[0]: np.nan, names[1]: -np.inf})
    expected = rf"weights must be finite, got NaN or an infinity in {names[0]}, {names[1]}; check_"
    with pytest.raises(ValueError, match=expected):
        Sam.from_pretrained(path)
    loaded = parameters(Sam.from_pretrained(path, check_finite=False))
    assert np.isnan(loaded[names[0]]).sum() == np.isneginf(loaded[names[1]]).sum() == 1


def test_values_that_the_parameters_cannot_hold_are_refused(tmp_path: Path):
    path = spoiled(tmp_path / "a.safetensors", {"image_encoder.neck.1.bias": 1e6})
    with pytest.raises(ConversionError, match=r"neck\.1\.bias has values that float16 cannot hold"):
        Sam.from_pretrained(path, dtype=jnp.float16)
    Sam.from_pretrained(path, dtype=jnp.bfloat16)


# --- Errors ---


@pytest.mark.parametrize(
    ("change", "texts"),
    [
        (lambda t: t.double(), ("182 of another dtype than", "and 177 more", "(dtype, --dtype)")),
        (lambda t: t.int(), ("182 of another dtype than", "and 177 more")),
        (lambda t: t[..., None], ("182 wrongly shaped", "and 177 more", "(config, or --config")),
    ],
    ids=["float64", "int32", "shapes"],
)
def test_errors_are_short_and_name_the_option(
    tmp_path: Path, change: Callable[[torch.Tensor], torch.Tensor], texts: tuple[str, ...]
):
    state = {name: change(torch.ones(shape)) for name, shape in meta_shapes(TINY).items()}
    torch.save(state, tmp_path / "a.pth")
    with pytest.raises(ConversionError) as error:
        convert_checkpoint(tmp_path / "a.pth", tmp_path / "a.safetensors")
    message = str(error.value).replace(str(tmp_path), "")
    assert len(message) < 700
    for text in texts:
        assert text in message


# --- Saving ---


def test_saving_gives_the_files_that_conversion_gives(tmp_path: Path, files: Path):
    sam = Sam.from_pretrained(files / "meta.pth")
    sam.save_pretrained(tmp_path / "a.safetensors")
    sam.save_pretrained(tmp_path / "a.pth")
    sam.save_pretrained(tmp_path / "hf", format="huggingface")
    for saved, converted in {
        "a.safetensors": "native.safetensors",
        "hf/model.safetensors": "hf/model.safetensors",
        "hf/config.json": "hf/config.json",
        "hf/preprocessor_config.json": "hf/preprocessor_config.json",
    }.items():
        assert (tmp_path / saved).read_bytes() == (files / converted).read_bytes()
    saved, converted = (
        torch.load(folder, weights_only=True) for folder in (tmp_path / "a.pth", files / "meta.pth")
    )
    assert same_bits(saved, converted)


@pytest.mark.parametrize("path", ["a.safetensors", "a.pth", "folder"])
@pytest.mark.parametrize("hq", [False, True], ids=["sam", "hq"])
def test_a_bfloat16_model_comes_back_as_it_was(tmp_path: Path, path: str, hq: bool):
    config = dataclasses.replace(SMALL, hq=hq)
    weights = random_weights(tmp_path / "weights.safetensors", config)
    sam = Sam.from_pretrained(weights, dtype=jnp.bfloat16)
    sam.save_pretrained(tmp_path / path, format="huggingface" if path == "folder" else None)
    back = Sam.from_pretrained(tmp_path / path, dtype=jnp.bfloat16)
    assert back.config == config
    found, expected = parameters(back), parameters(sam)
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert found[name].dtype == jnp.bfloat16
        np.testing.assert_array_equal(found[name], array, err_msg=name)


def test_saving_in_another_dtype(tmp_path: Path, files: Path):
    sam = Sam.from_pretrained(files / "native.safetensors")
    sam.save_pretrained(tmp_path / "a.pth", dtype="float16")
    state = torch.load(tmp_path / "a.pth", weights_only=True)
    assert {tensor.dtype for tensor in state.values()} == {torch.float16}
    with pytest.raises(ConversionError, match=r"dtype must be one of .*, got 'int8'"):
        sam.save_pretrained(tmp_path / "b.pth", dtype="int8")  # pyright: ignore[reportArgumentType]
    for path, message in {
        "a": "its format must be given",
        "absent/a.pth": "folder that exists",
    }.items():
        with pytest.raises(ConversionError, match=message):
            sam.save_pretrained(tmp_path / path)
    assert [path.name for path in tmp_path.iterdir()] == ["a.pth"]


def test_a_model_with_other_layers_is_not_saved(tmp_path: Path, files: Path):
    sam = Sam.from_pretrained(files / "native.safetensors")
    attention = sam.image_encoder.blocks[1].attn
    lora = nnx.LoRALinear(32, 96, lora_rank=2, rngs=nnx.Rngs(0))
    lora.kernel, lora.bias = attention.qkv.kernel, attention.qkv.bias
    attention.qkv = lora
    sam.image_encoder.neck[1].bias = None
    for name in ("a.safetensors", "a.pth", "a"):
        with pytest.raises(ValueError) as error:
            sam.save_pretrained(tmp_path / name, format="huggingface" if name == "a" else None)
        message = str(error.value)
        for text in (
            "must have the parameters that its config says",
            "1 missing (image_encoder.neck.1.bias)",
            "blocks.1.attn.qkv.lora.lora_a",
            "blocks.1.attn.qkv.lora.lora_b",
            "must be merged into SAM's own first",
        ):
            assert text in message
    assert not list(tmp_path.iterdir())


def test_a_merged_model_is_saved(tmp_path: Path, files: Path):
    sam = Sam.from_pretrained(files / "native.safetensors")
    kernel = sam.image_encoder.blocks[1].attn.qkv.kernel
    changed = kernel.get_value() + jnp.ones((32, 2)) @ jnp.ones((2, 96))
    kernel.set_value(changed)
    sam.save_pretrained(tmp_path / "a.safetensors")
    _, arrays = native.read(tmp_path / "a.safetensors")
    np.testing.assert_array_equal(arrays["image_encoder.blocks.1.attn.qkv.kernel"], changed)


# --- transformers ---


@pytest.mark.parametrize("hq", [False, True], ids=["sam", "hq"])
def test_transformers_processor_and_pipeline_take_a_saved_folder(tmp_path: Path, hq: bool):
    import transformers
    from PIL import Image

    config: SamConfig = dataclasses.replace(SMALL, hq=hq)
    path = random_weights(tmp_path / "a.safetensors", config)
    Sam.from_pretrained(path).save_pretrained(tmp_path / "hf", format="huggingface")
    kind = transformers.SamHQProcessor if hq else transformers.SamProcessor
    pixels = np.random.default_rng(0).integers(0, 256, (60, 90, 3), np.uint8)
    for processor in (
        kind.from_pretrained(tmp_path / "hf"),
        transformers.AutoProcessor.from_pretrained(tmp_path / "hf"),
    ):
        assert type(processor) is kind
        inputs = processor(pixels, input_points=[[[45.0, 30.0]]], return_tensors="pt")
        assert inputs["pixel_values"].shape == (1, 3, 128, 128)
        assert inputs["reshaped_input_sizes"].tolist() == [[85, 128]]
        # One level of 256, that is 1 / 57 of the smallest deviation.
        ours = np.asarray(preprocess(jnp.asarray(pixels[None]), 128))[0].transpose(2, 0, 1)
        np.testing.assert_allclose(inputs["pixel_values"][0], ours, atol=1.01 / 57.12)

    # The pipeline's last step, which drops masks of one thing, needs torchvision and nothing of the
    # folder. The thresholds keep every mask.
    pipeline = transformers.pipeline("mask-generation", model=str(tmp_path / "hf"))
    image = Image.fromarray(pixels)
    outputs = [
        pipeline.forward(batch, pred_iou_thresh=-1e9, stability_score_thresh=-1.0)
        for batch in pipeline.preprocess(image, points_per_crop=2, points_per_batch=2)
    ]
    assert len(outputs) == 2
    masks = [mask for output in outputs for mask in output["masks"]]
    assert [mask["size"] for mask in masks] == [[60, 90]] * (2 * 2 * 3)
