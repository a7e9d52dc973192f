"""What conversion refuses, that it says so in one line, and that it writes nothing then."""

from __future__ import annotations

import dataclasses
import os
import pickle
import re
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoint_files import TINY, meta_state, save_meta
from safetensors.torch import save_file

from sparsesam_jax.checkpoints import ConversionError, convert_checkpoint, native
from sparsesam_jax.cli.convert import main
from sparsesam_jax.config import ImageEncoderConfig


class Malicious:
    """Makes a file when it is unpickled freely."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self.path}",)


def cut(path: Path, share: float) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])


def bad_malicious(folder: Path) -> Path:
    torch.save(meta_state(TINY) | {"evil": Malicious(folder / "ran")}, folder / "a.pth")
    return folder / "a.pth"


def bad_malicious_old_format(folder: Path) -> Path:
    torch.save(
        {"model": Malicious(folder / "ran")},
        folder / "a.pth",
        _use_new_zipfile_serialization=False,
    )
    return folder / "a.pth"


def bad_malicious_bare_pickle(folder: Path) -> Path:
    (folder / "a.pth").write_bytes(pickle.dumps(Malicious(folder / "ran")))
    return folder / "a.pth"


def bad_malicious_text_pickle(folder: Path) -> Path:
    (folder / "a.pth").write_bytes(pickle.dumps(Malicious(folder / "ran"), protocol=0))
    return folder / "a.pth"


def bad_truncated_pth(folder: Path) -> Path:
    save_meta(folder / "a.pth")
    cut(folder / "a.pth", 0.7)
    return folder / "a.pth"


def bad_truncated_old_pth(folder: Path) -> Path:
    torch.save(meta_state(TINY), folder / "a.pth", _use_new_zipfile_serialization=False)
    cut(folder / "a.pth", 0.7)
    return folder / "a.pth"


def bad_corrupt_pickle(folder: Path) -> Path:
    # The archive is in order, with checksums; what it holds is no pickle.
    save_meta(folder / "b.pth")
    with (
        zipfile.ZipFile(folder / "b.pth") as source,
        zipfile.ZipFile(folder / "a.pth", "w") as target,
    ):
        for record in source.infolist():
            data = source.read(record)
            target.writestr(record.filename, data[::-1] if "data.pkl" in record.filename else data)
    (folder / "b.pth").unlink()
    return folder / "a.pth"


def bad_truncated_safetensors(folder: Path) -> Path:
    save_file(meta_state(TINY), folder / "a.safetensors")
    cut(folder / "a.safetensors", 0.7)
    return folder / "a.safetensors"


def bad_text(folder: Path) -> Path:
    (folder / "a.pth").write_text("sam_vit_b: https://example.org\n" * 20)
    return folder / "a.pth"


def bad_html_for_safetensors(folder: Path) -> Path:
    (folder / "a.safetensors").write_text("<html>{not found}</html>")
    return folder / "a.safetensors"


def bad_empty(folder: Path) -> Path:
    (folder / "a.pth").touch()
    return folder / "a.pth"


def bad_absent(folder: Path) -> Path:
    return folder / "absent.pth"


def bad_empty_folder(folder: Path) -> Path:
    (folder / "hf").mkdir()
    return folder / "hf"


def bad_other_model(folder: Path) -> Path:
    torch.save({"layer1.0.conv1.weight": torch.zeros(3, 3)}, folder / "a.pth")
    return folder / "a.pth"


def bad_other_encoder(folder: Path) -> Path:
    # As MobileSAM has it: SAM's decoder behind an encoder that is no ViT.
    state = {k: v for k, v in meta_state(TINY).items() if "image_encoder" not in k}
    torch.save(state | {"image_encoder.layers.0.conv.weight": torch.zeros(3)}, folder / "a.pth")
    return folder / "a.pth"


def bad_other_safetensors(folder: Path) -> Path:
    save_file({"bert.embeddings.weight": torch.zeros(3, 3)}, folder / "a.safetensors")
    return folder / "a.safetensors"


def bad_no_dict(folder: Path) -> Path:
    torch.save([torch.zeros(3)], folder / "a.pth")
    return folder / "a.pth"


def bad_two_state_dicts(folder: Path) -> Path:
    torch.save({"model": meta_state(TINY), "state_dict": meta_state(TINY)}, folder / "a.pth")
    return folder / "a.pth"


def bad_expanded_tensor(folder: Path) -> Path:
    # Four bytes that pose as a whole tensor.
    state = meta_state(TINY)
    torch.save(
        state | {"image_encoder.pos_embed": torch.zeros(1).expand(1, 3, 3, 12)}, folder / "a.pth"
    )
    return folder / "a.pth"


def bad_sparse_tensor(folder: Path) -> Path:
    state = meta_state(TINY)
    state["image_encoder.pos_embed"] = torch.zeros(1, 3, 3, 12).to_sparse()
    torch.save(state, folder / "a.pth")
    return folder / "a.pth"


def bad_huge_empty_tensor(folder: Path) -> Path:
    state = meta_state(TINY)
    state["image_encoder.pos_embed"] = torch.zeros(1, 10**7, 10**7, 0)
    save_file(state, folder / "a.safetensors")
    return folder / "a.safetensors"


def bad_self_containing_dict(folder: Path) -> Path:
    state: dict[str, object] = {}
    state["model"] = state
    torch.save(state, folder / "a.pth")
    return folder / "a.pth"


def bad_integers(folder: Path) -> Path:
    torch.save({name: tensor.int() for name, tensor in meta_state(TINY).items()}, folder / "a.pth")
    return folder / "a.pth"


def bad_metadata(folder: Path) -> Path:
    metadata = {"format": "sparsesam_jax", "config": "{}"}
    save_file({"a": torch.zeros(3)}, folder / "a.safetensors", metadata)
    return folder / "a.safetensors"


BAD = {name: maker for name, maker in sorted(globals().items()) if name.startswith("bad_")}


@pytest.mark.parametrize("make", BAD.values(), ids=BAD)
def test_bad_input_ends_with_one_line_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], make: Callable[[Path], Path]
):
    source = make(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    for target in ("out.safetensors", "out.pth"):
        assert main([str(source), str(tmp_path / target)]) == 2
        printed = capsys.readouterr()
        assert re.fullmatch(r"error: [^\n]+\n", printed.err), printed.err
        assert not printed.out
        assert sorted(tmp_path.rglob("*")) == before


def test_one_error_lists_everything(tmp_path: Path):
    state = meta_state(TINY)
    for name in ("image_encoder.pos_embed", "mask_decoder.transformer.layers.1.norm4.bias"):
        del state[name]
    state["image_encoder.blocks.1.attn.lora.weight"] = torch.zeros(3)
    state["module.image_encoder.neck.1.bias"] = torch.zeros(16)
    state["image_encoder.neck.2.weight"] = torch.zeros(16, 16, 1, 1)
    state["image_encoder.blocks.0.attn.rel_pos_w"] = torch.zeros(9, 4)
    state["image_encoder.blocks.999999.norm1.bias"] = torch.zeros(12)
    state["prompt_encoder.no_mask_embed.weight"] = torch.zeros(1, 16, dtype=torch.int64)
    torch.save(state, tmp_path / "a.pth")
    (tmp_path / "b.pth").write_bytes(b"old")
    with pytest.raises(ConversionError) as error:
        convert_checkpoint(tmp_path / "a.pth", tmp_path / "b.pth")
    message = str(error.value)
    for text in (
        "2 missing (",
        "image_encoder.pos_embed",
        "mask_decoder.transformer.layers.1.norm4.bias",
        "2 unknown (",
        "image_encoder.blocks.1.attn.lora.weight",
        "image_encoder.blocks.999999.norm1.bias",
        "2 wrongly shaped (",
        "image_encoder.neck.2.weight: expected (16, 16, 3, 3), got (16, 16, 1, 1)",
        "image_encoder.blocks.0.attn.rel_pos_w: expected (3, 4), got (9, 4)",
        "1 duplicate (image_encoder.neck.1.bias)",
        "(prompt_encoder.no_mask_embed.weight: int64)",
    ):
        assert text in message
    assert "\n" not in message
    assert (tmp_path / "b.pth").read_bytes() == b"old"
    assert len(list(tmp_path.iterdir())) == 2


def test_bad_destinations(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    save_meta(tmp_path / "a.pth")
    (tmp_path / "folder.pth").mkdir()
    for destination, options, message in [
        ("a.onnx", [], "must end in .pth, .pt, .safetensors"),
        ("b", [], "must end in .pth, .pt, .safetensors"),
        ("absent/b.pth", [], "must be in a folder that exists"),
        ("folder.pth", [], "must be a file in this format, but is a folder"),
        ("a.pth", ["--to", "huggingface"], "must be a folder in this format, but is a file"),
        ("b.pth", ["--dtype", "int8"], "int8"),
        ("b.pth", ["--to", "onnx"], "onnx"),
        ("b.pth", ["--config", str(tmp_path / "absent.json")], "absent.json"),
        ("b.pth", ["--config", str(tmp_path / "a.pth")], "error: "),
    ]:
        assert main([str(tmp_path / "a.pth"), str(tmp_path / destination), *options]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert re.fullmatch(r"error: [^\n]+\n", error)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.pth", "folder.pth"]
    assert main([]) == 2
    assert re.fullmatch(r"error: [^\n]+\n", capsys.readouterr().err)


def test_a_model_that_hugging_face_cannot_express(tmp_path: Path):
    save_meta(tmp_path / "a.pth", dataclasses.replace(TINY, iou_head_depth=1))
    convert_checkpoint(tmp_path / "a.pth", tmp_path / "a.safetensors")
    with pytest.raises(ConversionError, match="at least 2 layers"):
        convert_checkpoint(tmp_path / "a.safetensors", tmp_path / "hf", to="huggingface")
    assert not (tmp_path / "hf").exists()


def test_a_huggingface_folder_with_shards_is_left_alone(tmp_path: Path):
    save_meta(tmp_path / "a.pth")
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ConversionError, match="already has a checkpoint in shards"):
        convert_checkpoint(tmp_path / "a.pth", tmp_path / "hf", to="huggingface")


def test_the_command_line_converts(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    save_meta(tmp_path / "a.pth")
    (tmp_path / "config.json").write_text(TINY.to_json())
    path = tmp_path / "a.safetensors"
    options = ["--dtype", "bfloat16", "--config", str(tmp_path / "config.json")]
    assert main([str(tmp_path / "a.pth"), str(path), *options]) == 0
    assert capsys.readouterr().out == f"wrote {path}\n"
    config, arrays = native.read(path)
    assert config == TINY
    assert {array.dtype.name for array in arrays.values()} == {"bfloat16"}


def test_safetensors_need_no_torch_in_either_direction(tmp_path: Path):
    save_meta(tmp_path / "a.pth")
    convert_checkpoint(tmp_path / "a.pth", tmp_path / "a.safetensors")
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from sparsesam_jax.checkpoints import ConversionError, convert_checkpoint\n"
        "convert_checkpoint('a.safetensors', 'hf', to='huggingface')\n"
        "convert_checkpoint('hf', 'b.safetensors')\n"
        "try: convert_checkpoint('a.pth', 'c.safetensors')\n"
        "except ConversionError as error: print(error)\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    expected = "a.pth: PyTorch's checkpoints need PyTorch: pip install torch\n"
    assert run.stdout == expected, run.stderr
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
def test_peak_memory_is_at_most_1_3_times_the_file(tmp_path: Path):
    encoder = ImageEncoderConfig(embed_dim=768, depth=4, num_heads=12, global_attn_indexes=(1, 3))
    config = dataclasses.replace(TINY, image_encoder=encoder)
    state = save_meta(tmp_path / "a.pth", config)
    size = sum(tensor.nbytes for tensor in state.values())
    # The baseline is what the process has when everything is imported and traced. Writing 5 to
    # clear_refs sets the peak back to what is resident at that moment.
    code = (
        "import sys, torch, sparsesam_jax.checkpoints.torch_checkpoint\n"
        "from sparsesam_jax.checkpoints import convert_checkpoint, native\n"
        "from sparsesam_jax.config import SamConfig\n"
        "def resident(name):\n"
        "    line = next(line for line in open('/proc/self/status') if line.startswith(name))\n"
        "    return int(line.split()[1]) * 1024\n"
        "native.parameter_shapes(SamConfig.from_json(sys.argv[1]))\n"
        "for source, target in (('a.pth', 'a.safetensors'), ('a.safetensors', 'b.pth')):\n"
        "    open('/proc/self/clear_refs', 'w').write('5')\n"
        "    before = resident('VmRSS')\n"
        "    convert_checkpoint(source, target)\n"
        "    print(resident('VmHWM') - before)\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, config.to_json()],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    peaks = [int(line) / size for line in run.stdout.split()]
    assert len(peaks) == 2
    assert 0 < max(peaks) <= 1.3, peaks
    assert np.isclose(size, (tmp_path / "b.pth").stat().st_size, rtol=0.01)
