"""Which format a checkpoint has, which model, and what each parameter is called there."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Literal, NamedTuple

from sparsesam_jax.checkpoints import huggingface, native, rules
from sparsesam_jax.checkpoints.errors import ConversionError
from sparsesam_jax.checkpoints.recognise import Hints, recognise
from sparsesam_jax.checkpoints.sources import Source
from sparsesam_jax.config import SamConfig

Format = Literal["native", "meta", "huggingface"]


class TensorName(NamedTuple):
    """A parameter's name in a format, and the transform that leads from there to JAX's layout."""

    name: str
    transform: str


def format_of(path: Path, source: Source) -> Format:
    """The format of an open checkpoint.

    Raises:
        ConversionError: It is none of SAM.
    """
    if source.metadata.get("format") == native.FORMAT:
        return "native"
    beginnings = {".".join(name.split(".")[:2]) for name in source.tensors}
    if "image_encoder.blocks" in beginnings:
        return "meta"
    if "vision_encoder.layers" in beginnings:
        return "huggingface"
    some = ", ".join([*source.tensors][:3]) or "no tensor"
    raise ConversionError(
        f"{path} is no checkpoint of SAM with a ViT: it has neither image_encoder.blocks (Meta) "
        f"nor vision_encoder.layers (Hugging Face), but {some}"
    )


def config_of(path: Path, source: Source, source_format: Format) -> SamConfig:
    """The configuration of an open checkpoint's model.

    Raises:
        ConversionError: The checkpoint leaves it open.
        ValueError: The metadata of a native file is damaged.
    """
    if source_format == "native":
        return native.config_of(path, source.metadata)
    shapes = {name: spec.shape for name, spec in source.tensors.items()}
    hints = Hints()
    if source_format == "huggingface":
        shapes = _with_meta_names(shapes)
        if source.huggingface_config is not None:
            hints = huggingface.hints(source.huggingface_config)
    try:
        return recognise(shapes, hints)
    except ConversionError as error:
        raise ConversionError(f"{path}: {error}") from error


def tensor_names(
    parameters: Iterable[str], file_format: Format, config: SamConfig
) -> dict[str, TensorName]:
    """Parameter -> its name in a format.

    Raises:
        ConversionError: The format cannot express such a model.
    """
    if file_format == "native":
        return {key: TensorName(key, "same") for key in parameters}
    names = {key: _backward(rules.META_RULES, key) for key in parameters}
    if file_format == "meta":
        return names
    if config.iou_head_depth < 2:
        raise ConversionError(
            "Hugging Face's model has at least 2 layers in its mask-quality head, "
            f"got iou_head_depth={config.iou_head_depth}"
        )
    renames = rules.huggingface_rules(config.iou_head_depth)
    return {
        key: TensorName(_backward(renames, meta.name).name, meta.transform)
        for key, meta in names.items()
    }


def _backward(table: Iterable[rules.Rule], name: str) -> TensorName:
    found = rules.backward(table, name)
    if found is None:
        raise ConversionError(f"no rule converts {name}")
    return TensorName(*found)


def _with_meta_names(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Hugging Face's tensors under Meta's names, as far as there are any."""
    prefix = "mask_decoder.iou_prediction_head.layers."
    between = {
        name.removeprefix(prefix).split(".")[0] for name in shapes if name.startswith(prefix)
    }
    renames = rules.huggingface_rules(len(between) + 2)
    renamed = ((rules.forward(renames, name), shape) for name, shape in shapes.items())
    return {found[0]: shape for found, shape in renamed if found is not None}
