"""The rules between the names and layouts of the three formats, each a bijection.

A template has placeholders: `{#}` stands for a number, `{a|b}` for one of the words. Both sides of
a rule have the same placeholders in the same order, so that a rule reads in both directions.
`META_RULES` lead from Meta's names and PyTorch's layouts to this project's; `huggingface_rules`
from Hugging Face's names to Meta's (only the names differ there).
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from sparsesam_jax.checkpoints.errors import ConversionError
from sparsesam_jax.choices import Format
from sparsesam_jax.config import SamConfig

# A transform is the order that transposes PyTorch's axes to JAX's; `same` leaves them.
TRANSFORMS: dict[str, tuple[int, ...] | None] = {
    "same": None,
    "linear": (1, 0),  # (out, in) -> (in, out)
    "conv": (2, 3, 1, 0),  # (out, in, kh, kw) -> (kh, kw, in, out)
    "conv_transpose": (2, 3, 0, 1),  # (in, out, kh, kw) -> (kh, kw, in, out)
}


@dataclasses.dataclass(frozen=True)
class Rule:
    """One kind of tensor: its name in both formats and what happens to its axes.

    Attributes:
        source: Template of the name in the source format.
        target: Template of the name in the target format.
        transform: Key of `TRANSFORMS`, from source to target.
    """

    source: str
    target: str
    transform: str = "same"


class TensorName(NamedTuple):
    """A parameter's name in a format, and the transform that leads from there to JAX's layout."""

    name: str
    transform: str


def forward(rules: Iterable[Rule], name: str) -> tuple[str, str] | None:
    """The target name and the transform of a source name; None where no rule fits."""
    for rule in rules:
        target = _translate(rule.source, rule.target, name)
        if target is not None:
            return target, rule.transform
    return None


def backward(rules: Iterable[Rule], name: str) -> tuple[str, str] | None:
    """The source name and the transform of a target name; None where no rule fits."""
    for rule in rules:
        source = _translate(rule.target, rule.source, name)
        if source is not None:
            return source, rule.transform
    return None


def to_jax(array: np.ndarray, transform: str) -> np.ndarray:
    """A view of a PyTorch tensor in JAX's layout."""
    axes = TRANSFORMS[transform]
    return array if axes is None else array.transpose(axes)


def to_torch(array: np.ndarray, transform: str) -> np.ndarray:
    """A view of a JAX array in PyTorch's layout."""
    axes = TRANSFORMS[transform]
    return array if axes is None else array.transpose(np.argsort(axes))


def torch_shape(shape: tuple[int, ...], transform: str) -> tuple[int, ...]:
    """The shape in PyTorch's layout of an array that has `shape` in JAX's."""
    axes = TRANSFORMS[transform]
    return shape if axes is None else tuple(shape[axis] for axis in np.argsort(axes))


def matches(template: str, name: str) -> bool:
    """Whether a name fits a template."""
    return _pattern(template).fullmatch(name) is not None


def numbers(template: str, name: str) -> tuple[int, ...]:
    """The numbers in a name that fits a template; empty where it does not fit."""
    match = _pattern(template).fullmatch(name)
    return tuple(int(text) for text in match.groups() if text.isdigit()) if match else ()


def _translate(template: str, other: str, name: str) -> str | None:
    match = _pattern(template).fullmatch(name)
    if match is None:
        return None
    values = iter(match.groups())
    return re.sub(r"\{[^}]*\}", lambda _: next(values), other)


@functools.cache
def _pattern(template: str) -> re.Pattern[str]:
    pattern = ""
    for piece in re.split(r"(\{[^}]*\})", template):
        if piece == "{#}":
            # No leading zeros: "01" and "1" would be two names of one tensor.
            pattern += "(0|[1-9][0-9]{0,5})"
        elif piece.startswith("{"):
            pattern += f"({piece[1:-1]})"
        else:
            pattern += re.escape(piece)
    return re.compile(pattern)


def _same(name: str) -> tuple[Rule, ...]:
    return (Rule(name, name),)


def _embedding(path: str) -> tuple[Rule, ...]:
    return (Rule(f"{path}.weight", f"{path}.embedding"),)


def _norm(path: str) -> tuple[Rule, ...]:
    return (Rule(f"{path}.weight", f"{path}.scale"), *_same(f"{path}.bias"))


def _linear(path: str) -> tuple[Rule, ...]:
    return (Rule(f"{path}.weight", f"{path}.kernel", "linear"), *_same(f"{path}.bias"))


def _conv(path: str, *, transform: str = "conv", bias: bool = True) -> tuple[Rule, ...]:
    kernel = Rule(f"{path}.weight", f"{path}.kernel", transform)
    return (kernel, *_same(f"{path}.bias")) if bias else (kernel,)


def _conv_transpose(path: str) -> tuple[Rule, ...]:
    return _conv(path, transform="conv_transpose")


_LAYER = "mask_decoder.transformer.layers.{#}"
_ATTENTIONS = "{self_attn|cross_attn_token_to_image|cross_attn_image_to_token}"
_PROJECTIONS = "{q_proj|k_proj|v_proj|out_proj}"

META_RULES: tuple[Rule, ...] = (
    *_same("image_encoder.pos_embed"),
    *_conv("image_encoder.patch_embed.proj"),
    *_norm("image_encoder.blocks.{#}.{norm1|norm2}"),
    *_linear("image_encoder.blocks.{#}.attn.{qkv|proj}"),
    *_same("image_encoder.blocks.{#}.attn.{rel_pos_h|rel_pos_w}"),
    *_linear("image_encoder.blocks.{#}.mlp.{lin1|lin2}"),
    *_conv("image_encoder.neck.{0|2}", bias=False),
    *_norm("image_encoder.neck.{1|3}"),
    *_same("prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"),
    *_embedding("prompt_encoder.point_embeddings.{#}"),
    *_embedding("prompt_encoder.{not_a_point_embed|no_mask_embed}"),
    *_conv("prompt_encoder.mask_downscaling.{0|3|6}"),
    *_norm("prompt_encoder.mask_downscaling.{1|4}"),
    *_linear(f"{_LAYER}.{_ATTENTIONS}.{_PROJECTIONS}"),
    *_linear(f"{_LAYER}.mlp.{{lin1|lin2}}"),
    *_norm(f"{_LAYER}.{{norm1|norm2|norm3|norm4}}"),
    *_linear(f"mask_decoder.transformer.final_attn_token_to_image.{_PROJECTIONS}"),
    *_norm("mask_decoder.transformer.norm_final_attn"),
    *_embedding("mask_decoder.{iou_token|mask_tokens}"),
    *_conv_transpose("mask_decoder.output_upscaling.{0|3}"),
    *_norm("mask_decoder.output_upscaling.1"),
    *_linear("mask_decoder.output_hypernetworks_mlps.{#}.layers.{#}"),
    *_linear("mask_decoder.iou_prediction_head.layers.{#}"),
    # SAM-HQ
    *_embedding("mask_decoder.hf_token"),
    *_linear("mask_decoder.hf_mlp.layers.{#}"),
    *_conv_transpose("mask_decoder.{compress_vit_feat|embedding_encoder}.{0|3}"),
    *_conv("mask_decoder.embedding_maskfeature.{0|3}"),
    *_norm("mask_decoder.{compress_vit_feat|embedding_encoder|embedding_maskfeature}.1"),
)


def _rename(source: str, target: str) -> tuple[Rule, ...]:
    return tuple(Rule(f"{source}.{leaf}", f"{target}.{leaf}") for leaf in ("weight", "bias"))


def _rename_all(
    source: str, target: str, names: dict[str, str], kept: tuple[str, ...] = ()
) -> tuple[Rule, ...]:
    """`names` and `kept` follow the prefixes `source` and `target`."""
    pairs = [*names.items(), *((name, name) for name in kept)]
    return tuple(rule for old, new in pairs for rule in _rename(source + old, target + new))


def _rename_mlp(source: str, target: str, depth: int) -> tuple[Rule, ...]:
    """Hugging Face names an MLP's first and last layer apart from those between."""
    between = {f"layers.{layer - 1}": f"layers.{layer}" for layer in range(1, depth - 1)}
    ends = {"proj_in": "layers.0", "proj_out": f"layers.{depth - 1}"}
    return _rename_all(f"{source}.", f"{target}.", ends | between)


_POSITIONAL = "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"
# The positional embedding has two names in Hugging Face's models (one tensor, tied). The first is
# the one that transformers saves.
HUGGINGFACE_TIED = (
    "shared_image_embedding.positional_embedding",
    "prompt_encoder.shared_embedding.positional_embedding",
)
_ENDS = {"conv1": "0", "norm": "1", "conv2": "3"}


@functools.cache
def huggingface_rules(iou_head_depth: int) -> tuple[Rule, ...]:
    """The rules from Hugging Face's names to Meta's.

    Args:
        iou_head_depth: Layers of the mask-quality head, whose last layer has a name of its own.
    """
    return (
        Rule(HUGGINGFACE_TIED[0], _POSITIONAL),
        Rule("vision_encoder.pos_embed", "image_encoder.pos_embed"),
        *_rename("vision_encoder.patch_embed.projection", "image_encoder.patch_embed.proj"),
        *_rename_all(
            "vision_encoder.layers.{#}.",
            "image_encoder.blocks.{#}.",
            {"layer_norm1": "norm1", "layer_norm2": "norm2"},
            kept=("attn.{qkv|proj}", "mlp.{lin1|lin2}"),
        ),
        Rule(
            "vision_encoder.layers.{#}.attn.{rel_pos_h|rel_pos_w}",
            "image_encoder.blocks.{#}.attn.{rel_pos_h|rel_pos_w}",
        ),
        Rule("vision_encoder.neck.conv1.weight", "image_encoder.neck.0.weight"),
        Rule("vision_encoder.neck.conv2.weight", "image_encoder.neck.2.weight"),
        *_rename_all(
            "vision_encoder.neck.",
            "image_encoder.neck.",
            {"layer_norm1": "1", "layer_norm2": "3"},
        ),
        Rule("prompt_encoder.point_embed.{#}.weight", "prompt_encoder.point_embeddings.{#}.weight"),
        *_same("prompt_encoder.{not_a_point_embed|no_mask_embed}.weight"),
        *_rename_all(
            "prompt_encoder.mask_embed.",
            "prompt_encoder.mask_downscaling.",
            {"conv1": "0", "layer_norm1": "1", "conv2": "3", "layer_norm2": "4", "conv3": "6"},
        ),
        *_rename_all(
            f"{_LAYER}.",
            f"{_LAYER}.",
            {f"layer_norm{i}": f"norm{i}" for i in (1, 2, 3, 4)},
            kept=(f"{_ATTENTIONS}.{_PROJECTIONS}", "mlp.{lin1|lin2}"),
        ),
        *_rename_all(
            "mask_decoder.transformer.",
            "mask_decoder.transformer.",
            {"layer_norm_final_attn": "norm_final_attn"},
            kept=(f"final_attn_token_to_image.{_PROJECTIONS}",),
        ),
        *_same("mask_decoder.{iou_token|mask_tokens}.weight"),
        *_rename_all(
            "mask_decoder.",
            "mask_decoder.output_upscaling.",
            {"upscale_conv1": "0", "upscale_layer_norm": "1", "upscale_conv2": "3"},
        ),
        *_rename_mlp(
            "mask_decoder.output_hypernetworks_mlps.{#}",
            "mask_decoder.output_hypernetworks_mlps.{#}",
            3,
        ),
        *_rename_mlp(
            "mask_decoder.iou_prediction_head", "mask_decoder.iou_prediction_head", iou_head_depth
        ),
        # SAM-HQ
        Rule("mask_decoder.hq_token.weight", "mask_decoder.hf_token.weight"),
        *_rename_mlp("mask_decoder.hq_mask_mlp", "mask_decoder.hf_mlp", 3),
        *_rename_all("mask_decoder.compress_vit_", "mask_decoder.compress_vit_feat.", _ENDS),
        *_rename_all("mask_decoder.encoder_", "mask_decoder.embedding_encoder.", _ENDS),
        *_rename_all("mask_decoder.mask_", "mask_decoder.embedding_maskfeature.", _ENDS),
    )


def tensor_names(
    parameters: Iterable[str], file_format: Format, config: SamConfig
) -> dict[str, TensorName]:
    """Parameter -> its name in a format.

    Raises:
        ConversionError: The format cannot express such a model.
    """
    if file_format == "native":
        return {key: TensorName(key, "same") for key in parameters}
    names = {key: _source_of(META_RULES, key) for key in parameters}
    if file_format == "meta":
        return names
    if config.iou_head_depth < 2:
        raise ConversionError(
            "Hugging Face's model has at least 2 layers in its mask-quality head, "
            f"got iou_head_depth={config.iou_head_depth}"
        )
    renames = huggingface_rules(config.iou_head_depth)
    return {
        key: TensorName(_source_of(renames, meta.name).name, meta.transform)
        for key, meta in names.items()
    }


def prefix_of(name: str) -> str | None:
    """What stands before a parameter's name in Meta's or Hugging Face's format; None without one.

    "model.mask_decoder.iou_token.weight" has "model.", and "mask_decoder.iou_token.weight" "".
    """
    match = _ends_in_parameter().search(name)
    return None if match is None else name[: match.start("name")]


def _source_of(table: Iterable[Rule], name: str) -> TensorName:
    found = backward(table, name)
    if found is None:
        raise ConversionError(f"no rule converts {name}")
    return TensorName(*found)


@functools.cache
def _ends_in_parameter() -> re.Pattern[str]:
    # Meta's rules cover the layers between the ends of a mask-quality head of any depth.
    templates = {rule.source for rule in (*META_RULES, *huggingface_rules(3))}
    patterns = (
        _pattern(template).pattern for template in (*sorted(templates), HUGGINGFACE_TIED[1])
    )
    return re.compile(rf"(?:^|\.)(?P<name>{'|'.join(patterns)})\Z")
