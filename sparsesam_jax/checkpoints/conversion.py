"""Converts a checkpoint between Meta's, Hugging Face's and this project's format."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Literal, get_args

import numpy as np

from sparsesam_jax.checkpoints import huggingface, native, rules
from sparsesam_jax.checkpoints.errors import ConversionError
from sparsesam_jax.checkpoints.formats import Format, TensorName, config_of, format_of, tensor_names
from sparsesam_jax.checkpoints.native import TensorSpec
from sparsesam_jax.checkpoints.sources import Source, open_source
from sparsesam_jax.config import PRESETS, SamConfig

Dtype = Literal["float32", "float16", "bfloat16"]

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
        src: Meta's or SAM-HQ's `.pth`, Hugging Face's safetensors (file, folder or index of
            shards), or this project's safetensors. Its content says which.
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
            is one line and lists every tensor that is missing, unknown, duplicate or wrongly
            shaped. Nothing is written.
        OSError: A file cannot be read or written.
    """
    src, dst = Path(src), Path(dst)
    target_format = _target_format(dst, to)
    if dtype is not None and dtype not in get_args(Dtype):
        raise ConversionError(f"dtype must be one of {', '.join(get_args(Dtype))}, got {dtype!r}")
    try:
        source = open_source(src)
        source_format = format_of(src, source)
        if config is None or source_format == "native":
            found = config_of(src, source, source_format)
            if config not in (None, found):
                raise ConversionError(f"{src} must have the given config, but has {found}")
            config = found
        shapes = {key: spec.shape for key, spec in native.parameter_shapes(config).items()}
    except ConversionError:
        raise
    except ValueError as error:
        raise ConversionError(str(error)) from error
    names = tensor_names(shapes, source_format, config)
    names |= _tied_name(source, source_format, names)
    _check(src, source, config, names, shapes, dtype)

    targets = tensor_names(shapes, target_format, config)
    key_of = {target.name: key for key, target in targets.items()}
    tensors = {
        target.name: TensorSpec(
            rules.torch_shape(shapes[key], target.transform),
            dtype or source.tensors[names[key].name].dtype,
        )
        for key, target in targets.items()
    }
    with _progress_bar(progress, sum(spec.nbytes for spec in tensors.values())) as advance:

        def load(target: str) -> np.ndarray:
            name, transform = names[key_of[target]]
            array = rules.to_jax(source.load(name), transform)
            array = rules.to_torch(array, targets[key_of[target]].transform)
            advance(tensors[target].nbytes)
            return _cast(array, tensors[target].dtype, name)

        _write(dst, target_format, config, tensors, load)
    return config


def _target_format(dst: Path, to: Format | None) -> Format:
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


def _tied_name(
    source: Source, source_format: Format, names: Mapping[str, TensorName]
) -> dict[str, TensorName]:
    """The positional embedding's other name, where a Hugging Face file has only that."""
    first, second = rules.HUGGINGFACE_TIED
    if source_format != "huggingface" or first in source.tensors or second not in source.tensors:
        return {}
    return {key: TensorName(second, "same") for key, name in names.items() if name.name == first}


def _check(
    src: Path,
    source: Source,
    config: SamConfig,
    names: Mapping[str, TensorName],
    shapes: Mapping[str, tuple[int, ...]],
    dtype: Dtype | None,
) -> None:
    expected = {
        name.name: rules.torch_shape(shapes[key], name.transform) for key, name in names.items()
    }
    # float64 has no place in the target, but may be the source of a smaller dtype.
    dtypes = native.DTYPES if dtype is None else (*native.DTYPES, "float64")
    found = dict(source.tensors)
    first, second = rules.HUGGINGFACE_TIED
    unequal = []
    if first in expected and second in found:
        spec = found.pop(second)
        if first in found and spec.dtype in dtypes:
            same = found[first] == spec and _bits(source, first) == _bits(source, second)
            unequal = [] if same else [f"{first} and {second}"]
    problems = native.mismatches(expected, found, dtypes) + native.list_problems(
        {**source.problems, "tied but unequal": unequal}
    )
    if source.huggingface_config is not None:
        problems += native.list_problems(
            {
                f"different in {huggingface.CONFIG_NAME}": huggingface.differences(
                    source.huggingface_config, config
                )
            }
        )
    if problems:
        raise ConversionError(f"{src} does not fit the model that it seems: {'; '.join(problems)}")


def _bits(source: Source, name: str) -> bytes:
    return source.load(name).tobytes()


def _cast(array: np.ndarray, dtype: str, name: str) -> np.ndarray:
    if array.dtype.name == dtype:
        return array
    # Overflow is looked for below; a NaN stays one.
    with np.errstate(over="ignore", invalid="ignore"):
        cast = array.astype(dtype)
    if not np.array_equal(np.isinf(cast), np.isinf(array)):
        raise ConversionError(f"{name} has values that {dtype} cannot hold")
    return cast


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

        torch_checkpoint.write(dst, tensors, load)
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
