"""Reads a checkpoint of any format as this project's parameters, once it is known to fit."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sparsesam_jax.checkpoints import huggingface, native, rules
from sparsesam_jax.checkpoints.errors import CONFIG_HINT, ConversionError, few, list_problems
from sparsesam_jax.checkpoints.recognise import Hints, recognise
from sparsesam_jax.checkpoints.rules import HUGGINGFACE_TIED, TensorName
from sparsesam_jax.checkpoints.sources import CONFIG_NAME, Source, open_source, read_json
from sparsesam_jax.checkpoints.wrapping import Unwrapped, unwrap
from sparsesam_jax.choices import Format
from sparsesam_jax.config import SamConfig

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """An open checkpoint, which has exactly the parameters of one model.

    Attributes:
        path: The file or folder.
        format: Its format.
        config: Shape of the model.
        metadata: The text that the file carries beside its tensors.
        tensors: Parameter -> its shape in JAX's layout and its dtype in the file.
        remarks: What was stripped of names and what was left out, one text each.
    """

    path: Path
    format: Format
    config: SamConfig
    metadata: Mapping[str, str]
    tensors: Mapping[str, native.TensorSpec]
    remarks: tuple[str, ...]
    _source: Source = dataclasses.field(repr=False)
    _names: Mapping[str, TensorName] = dataclasses.field(repr=False)

    def load(self, parameter: str) -> np.ndarray:
        """A parameter in JAX's layout and the file's dtype; it may be a view of the file."""
        name, transform = self._names[parameter]
        return rules.to_jax(self._source.load(name), transform)


def open_checkpoint(
    path: str | os.PathLike[str],
    *,
    config: SamConfig | None = None,
    dtypes: Sequence[str] = native.DTYPES,
) -> Checkpoint:
    """Open a checkpoint of SAM or SAM-HQ and check all but its values.

    What is stripped of its names, and what is left out as none of the model's, is logged.

    Args:
        path: Meta's or SAM-HQ's `.pth`, Hugging Face's file, folder or index of shards, or this
            project's safetensors. Its content says which.
        config: The model's shape, for a checkpoint whose tensors do not tell it.
        dtypes: The dtypes that will do.

    Raises:
        ConversionError: It is no intact checkpoint of SAM. The message is one line; it counts the
            tensors that are missing, unknown, duplicate or wrongly shaped and names the first few.
        OSError: A file cannot be read.
    """
    path = Path(path)
    try:
        source, config_path = open_source(path)
        return _checked(path, source, config_path, config, dtypes)
    except ValueError as error:
        text = str(error)
        named = text if text.startswith(str(path)) else f"{path}: {text}"
        raise ConversionError(named) from error


def _checked(
    path: Path,
    source: Source,
    config_path: Path | None,
    config: SamConfig | None,
    dtypes: Sequence[str],
) -> Checkpoint:
    if source.metadata.get("format") == native.FORMAT:
        file_format, unwrapped = "native", Unwrapped({name: name for name in source.tensors})
    else:
        unwrapped = unwrap(source.entries, source.beside)
        file_format = _format_of(unwrapped.names)
    names, unequal, theirs = dict(unwrapped.names), [], None
    if file_format == "huggingface":
        names, unequal = _untied(source, names, dtypes)
        theirs = None if config_path is None else read_json(config_path)
    found = {name: source.tensors[in_file] for name, in_file in names.items()}
    model = _config_of(path, source, found, file_format, theirs, config)
    shapes = {key: spec.shape for key, spec in native.parameter_shapes(model).items()}
    wanted = rules.tensor_names(shapes, file_format, model)

    expected = {
        name: rules.torch_shape(shapes[key], transform) for key, (name, transform) in wanted.items()
    }
    none_of_ours = source.tensors.keys() - set(unwrapped.names.values())
    problems = native.mismatches(expected, found, dtypes) + list_problems(
        {
            "duplicate": unwrapped.duplicates,
            "tied but unequal": unequal,
            **{
                kind: [name for name in concerned if name not in none_of_ours]
                for kind, concerned in source.problems.items()
            },
            f"different in {CONFIG_NAME}": (
                [] if theirs is None else huggingface.differences(theirs, model)
            ),
        }
    )
    remarks = _remarks(unwrapped)
    if problems:
        read = f", read {' and '.join(remarks)}," if remarks else ""
        hints = _hints(expected, found, config)
        raise ConversionError(
            f"{path}{read} does not fit the model that it seems: {'; '.join(problems + hints)}"
        )
    if remarks:
        _log.warning("%s is read %s", path, " and ".join(remarks))
    return Checkpoint(
        path=path,
        format=file_format,
        config=model,
        metadata=source.metadata,
        tensors={
            key: native.TensorSpec(shape, found[wanted[key].name].dtype)
            for key, shape in shapes.items()
        },
        remarks=remarks,
        _source=source,
        _names={
            key: TensorName(names[name], transform) for key, (name, transform) in wanted.items()
        },
    )


def _format_of(names: Iterable[str]) -> Format:
    names = [*names]
    beginnings = {".".join(name.split(".")[:2]) for name in names}
    if "image_encoder.blocks" in beginnings:
        return "meta"
    if "vision_encoder.layers" in beginnings:
        return "huggingface"
    raise ConversionError(
        "it is no checkpoint of SAM with a ViT: it has neither image_encoder.blocks (Meta) nor "
        f"vision_encoder.layers (Hugging Face), but {few(names) or 'no tensor'}"
    )


def _config_of(
    path: Path,
    source: Source,
    found: Mapping[str, native.TensorSpec],
    file_format: Format,
    theirs: Mapping[str, Any] | None,
    given: SamConfig | None,
) -> SamConfig:
    config = None
    if file_format == "native":
        config = native.config_of(path, source.metadata)
    elif theirs is None and native.CONFIG_KEY in source.metadata:
        config = SamConfig.from_json(source.metadata[native.CONFIG_KEY])
    if config is not None:
        if given not in (None, config):
            raise ConversionError(f"it must have the given config, but has {config}")
        return config
    if given is not None:
        return given
    shapes = {name: spec.shape for name, spec in found.items()}
    hints = Hints()
    if file_format == "huggingface":
        shapes = _with_meta_names(shapes)
        hints = Hints() if theirs is None else huggingface.hints(theirs)
    return recognise(shapes, hints)


def _with_meta_names(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Hugging Face's tensors under Meta's names, as far as there are any."""
    prefix = "mask_decoder.iou_prediction_head.layers."
    between = {
        name.removeprefix(prefix).split(".")[0] for name in shapes if name.startswith(prefix)
    }
    renames = rules.huggingface_rules(len(between) + 2)
    renamed = ((rules.forward(renames, name), shape) for name, shape in shapes.items())
    return {found[0]: shape for found, shape in renamed if found is not None}


def _untied(
    source: Source, names: Mapping[str, str], dtypes: Sequence[str]
) -> tuple[dict[str, str], list[str]]:
    """The names with one for the positional embedding, and both of them where their bits differ.

    A Hugging Face file may have either name or both.
    """
    first, second = HUGGINGFACE_TIED
    names = dict(names)
    other = names.pop(second, None)
    one = names.get(first, other)
    if one is None or other is None or one == other:
        return names if one is None else names | {first: one}, []
    same = source.tensors[one] == source.tensors[other]
    # What is broken is no values to compare; it is an error in any case.
    if same and source.tensors[one].dtype in dtypes and not any(source.problems.values()):
        same = source.load(one).tobytes() == source.load(other).tobytes()
    return names, [] if same else [f"{first} and {second}"]


def _remarks(unwrapped: Unwrapped) -> tuple[str, ...]:
    remarks = []
    if unwrapped.stripped:
        remarks.append(f"without {few(map(repr, unwrapped.stripped))} in its names")
    if unwrapped.left_out:
        remarks.append(f"without its {few(unwrapped.left_out)}")
    return tuple(remarks)


def _hints(
    expected: Mapping[str, tuple[int, ...]],
    found: Mapping[str, native.TensorSpec],
    config: SamConfig | None,
) -> list[str]:
    """What may help."""
    hints = []
    if any(spec.dtype == "float64" for spec in found.values()):
        hints.append("give the dtype to convert to (dtype, --dtype)")
    ours = [(expected[name], spec.shape) for name, spec in found.items() if name in expected]
    if config is None and any(one != other for one, other in ours):
        hints.append(f"where another shape is meant, {CONFIG_HINT}")
    return hints
