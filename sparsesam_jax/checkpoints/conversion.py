"""Writes checkpoints in Meta's, Hugging Face's and this project's format, and converts them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import get_args

import numpy as np

from sparsesam_jax.checkpoints import huggingface, native, rules
from sparsesam_jax.checkpoints.errors import ConversionError
from sparsesam_jax.checkpoints.native import TensorSpec
from sparsesam_jax.checkpoints.reading import open_checkpoint
from sparsesam_jax.choices import Dtype, Format
from sparsesam_jax.config import PRESETS, SamConfig

_FORMAT_OF_SUFFIX: dict[str, Format] = {".pth": "meta", ".pt": "meta", ".safetensors": "native"}


def convert_checkpoint(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    *,
    to: Format | None = None,
    dtype: Dtype | None = None,
    config: SamConfig | None = None,
    progress: bool = False,
) -> SamConfig:
    """Convert a checkpoint; every value keeps its bits unless `dtype` is given.

    Args:
        src: What `open_checkpoint` takes: Meta's or SAM-HQ's `.pth`, Hugging Face's file, folder or
            index of shards, or this project's safetensors.
        dst: What to write; a file that exists is replaced. Hugging Face's format is a folder, or
            the tensors alone where `dst` ends in `.safetensors`.
        to: Format of `dst`; None goes by its suffix (`.pth`, `.pt`: meta; `.safetensors`: native).
        dtype: Dtype of all tensors in `dst`; None keeps those of `src`.
        config: The model's shape, for a checkpoint whose tensors do not tell it.
        progress: Whether to draw a progress bar on standard error.

    Returns:
        The model's shape.

    Raises:
        ConversionError: `src` is no intact checkpoint of SAM, or cannot become `dst`. The message
            is one line; it counts the tensors that are missing, unknown, duplicate or wrongly
            shaped and names the first few. Nothing is written.
        OSError: A file cannot be read or written.
    """
    # Before anything is read: a wrong destination is said at once.
    target_format(Path(dst), to, dtype)
    dtypes = native.DTYPES if dtype is None else (*native.DTYPES, "float64")
    checkpoint = open_checkpoint(src, config=config, dtypes=dtypes)
    write_checkpoint(
        dst,
        checkpoint.config,
        checkpoint.tensors,
        checkpoint.load,
        to=to,
        dtype=dtype,
        progress=progress,
    )
    return checkpoint.config


def write_checkpoint(
    dst: str | os.PathLike[str],
    config: SamConfig,
    parameters: Mapping[str, TensorSpec],
    load: Callable[[str], np.ndarray],
    *,
    to: Format | None = None,
    dtype: Dtype | None = None,
    progress: bool = False,
) -> None:
    """Write a model's parameters in any format, whole or not at all.

    Args:
        dst: What to write, as for `convert_checkpoint`.
        config: Shape of the model.
        parameters: Shape and dtype of each of its parameters.
        load: Returns the named parameter's array.
        to: Format of `dst`; None goes by its suffix.
        dtype: Dtype of all tensors; None keeps those of `parameters`.
        progress: Whether to draw a progress bar on standard error.

    Raises:
        ConversionError: The format cannot have such a model or its values.
        OSError: A file cannot be written.
    """
    dst = Path(dst)
    file_format = target_format(dst, to, dtype)
    targets = rules.tensor_names(parameters, file_format, config)
    key_of = {target.name: key for key, target in targets.items()}
    tensors = {
        target.name: TensorSpec(
            rules.torch_shape(parameters[key].shape, target.transform),
            dtype or parameters[key].dtype,
        )
        for key, target in targets.items()
    }
    with _progress_bar(progress, sum(spec.nbytes for spec in tensors.values())) as advance:

        def load_target(name: str) -> np.ndarray:
            array = rules.to_torch(load(key_of[name]), targets[key_of[name]].transform)
            advance(tensors[name].nbytes)
            return cast(array, tensors[name].dtype, key_of[name])

        _write(dst, file_format, config, tensors, load_target)


def cast(array: np.ndarray, dtype: str, name: str) -> np.ndarray:
    """An array in another dtype.

    Raises:
        ConversionError: It has finite values that would become infinite.
    """
    if array.dtype.name == dtype:
        return array
    # Overflow is looked for below; a NaN stays one.
    with np.errstate(over="ignore", invalid="ignore"):
        result = array.astype(dtype)
    if not np.array_equal(np.isinf(result), np.isinf(array)):
        raise ConversionError(f"{name} has values that {dtype} cannot hold")
    return result


def target_format(dst: Path, to: Format | None, dtype: str | None) -> Format:
    """The format to write.

    Raises:
        ConversionError: An argument is none of its choices, or `dst` cannot be what is asked for.
    """
    if dtype is not None and dtype not in get_args(Dtype):
        raise ConversionError(f"dtype must be one of {', '.join(get_args(Dtype))}, got {dtype!r}")
    if to is not None and to not in get_args(Format):
        raise ConversionError(f"to must be one of {', '.join(get_args(Format))}, got {to!r}")
    target = to or _FORMAT_OF_SUFFIX.get(dst.suffix)
    if target is None:
        raise ConversionError(
            f"{dst} must end in {', '.join(_FORMAT_OF_SUFFIX)}, or its format must be given: "
            f"{', '.join(get_args(Format))}"
        )
    if not dst.absolute().parent.is_dir():
        raise ConversionError(f"{dst} must be in a folder that exists")
    is_folder = target == "huggingface" and dst.suffix != ".safetensors"
    if dst.exists() and dst.is_dir() != is_folder:
        expected, got = ("folder", "file") if is_folder else ("file", "folder")
        raise ConversionError(f"{dst} must be a {expected} in this format, but is a {got}")
    return target


def _write(
    dst: Path,
    target_format: Format,
    config: SamConfig,
    tensors: Mapping[str, TensorSpec],
    load: Callable[[str], np.ndarray],
) -> None:
    if target_format == "native":
        name = next((name for name, preset in PRESETS.items() if preset == config), None)
        metadata = native.native_metadata(config, name)
        native.write_safetensors(dst, metadata, tensors, load)
    elif target_format == "meta":
        from sparsesam_jax.checkpoints import torch_checkpoint

        metadata = {native.CONFIG_KEY: config.to_json()}
        torch_checkpoint.write(dst, metadata, tensors, load)
    else:
        huggingface.write(dst, config, tensors, load)


@contextlib.contextmanager
def _progress_bar(shown: bool, total: int) -> Iterator[Callable[[int], None]]:
    if not shown:
        yield lambda _: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn

    columns = (BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("convert", total=total)
        yield lambda count: bar.advance(task, count)
