"""Checkpoints for the conversion's tests: Meta's and SAM-HQ's key list, written out by hand.

Nothing here comes from the rules that it tests: names and shapes follow the modules of
facebookresearch/segment-anything and SysCV/sam-hq in their order of definition.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sparsesam_jax.config import ImageEncoderConfig, SamConfig

Shape = tuple[int, ...]

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

_EMBEDDINGS = {
    *("point_embeddings", "not_a_point_embed", "no_mask_embed"),
    *("iou_token", "mask_tokens", "hf_token"),
}
_TRANSPOSED_CONVOLUTIONS = {"output_upscaling", "compress_vit_feat", "embedding_encoder"}

# Windows of 2 on a grid of 3: windowed and global blocks have tables of different length.
TINY = SamConfig(
    image_encoder=ImageEncoderConfig(
        embed_dim=12,
        depth=3,
        num_heads=3,
        global_attn_indexes=(1,),
        image_size=24,
        patch_size=8,
        window_size=2,
        mlp_ratio=2.0,
        out_chans=16,
    ),
    mask_in_chans=8,
    num_multimask_outputs=2,
    decoder_depth=2,
    decoder_mlp_dim=24,
    iou_head_depth=3,
    iou_head_hidden_dim=20,
)


def meta_shapes(config: SamConfig) -> dict[str, Shape]:
    """Key -> shape of the state dict that Meta's (or SAM-HQ's) `Sam` has."""
    shapes: dict[str, Shape] = {}

    def affine(path: str, *weight: int, bias: int | None = None) -> None:
        shapes[f"{path}.weight"] = weight
        shapes[f"{path}.bias"] = (weight[0] if bias is None else bias,)

    encoder, c = config.image_encoder, config.image_encoder.out_chans
    d, hidden, grid = encoder.embed_dim, encoder.mlp_dim, encoder.grid_size
    shapes["image_encoder.pos_embed"] = (1, grid, grid, d)
    affine("image_encoder.patch_embed.proj", d, 3, encoder.patch_size, encoder.patch_size)
    for index in range(encoder.depth):
        block = f"image_encoder.blocks.{index}"
        side = grid if index in encoder.global_attn_indexes else encoder.window_size
        affine(f"{block}.norm1", d)
        shapes[f"{block}.attn.rel_pos_h"] = (2 * side - 1, d // encoder.num_heads)
        shapes[f"{block}.attn.rel_pos_w"] = (2 * side - 1, d // encoder.num_heads)
        affine(f"{block}.attn.qkv", 3 * d, d)
        affine(f"{block}.attn.proj", d, d)
        affine(f"{block}.norm2", d)
        affine(f"{block}.mlp.lin1", hidden, d)
        affine(f"{block}.mlp.lin2", d, hidden)
    shapes["image_encoder.neck.0.weight"] = (c, d, 1, 1)
    affine("image_encoder.neck.1", c)
    shapes["image_encoder.neck.2.weight"] = (c, c, 3, 3)
    affine("image_encoder.neck.3", c)

    mask = config.mask_in_chans
    shapes["prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"] = (2, c // 2)
    for index in range(4):
        shapes[f"prompt_encoder.point_embeddings.{index}.weight"] = (1, c)
    shapes["prompt_encoder.not_a_point_embed.weight"] = (1, c)
    affine("prompt_encoder.mask_downscaling.0", mask // 4, 1, 2, 2)
    affine("prompt_encoder.mask_downscaling.1", mask // 4)
    affine("prompt_encoder.mask_downscaling.3", mask, mask // 4, 2, 2)
    affine("prompt_encoder.mask_downscaling.4", mask)
    affine("prompt_encoder.mask_downscaling.6", c, mask, 1, 1)
    shapes["prompt_encoder.no_mask_embed.weight"] = (1, c)

    def attention(path: str, inner: int) -> None:
        for name in ("q_proj", "k_proj", "v_proj"):
            affine(f"{path}.{name}", inner, c)
        affine(f"{path}.out_proj", c, inner)

    def mlp(path: str, widths: list[int]) -> None:
        for index, (inputs, outputs) in enumerate(itertools.pairwise(widths)):
            affine(f"{path}.layers.{index}", outputs, inputs)

    transformer = "mask_decoder.transformer"
    for index in range(config.decoder_depth):
        layer = f"{transformer}.layers.{index}"
        attention(f"{layer}.self_attn", c)
        affine(f"{layer}.norm1", c)
        attention(f"{layer}.cross_attn_token_to_image", c // 2)
        affine(f"{layer}.norm2", c)
        affine(f"{layer}.mlp.lin1", config.decoder_mlp_dim, c)
        affine(f"{layer}.mlp.lin2", c, config.decoder_mlp_dim)
        affine(f"{layer}.norm3", c)
        affine(f"{layer}.norm4", c)
        attention(f"{layer}.cross_attn_image_to_token", c // 2)
    attention(f"{transformer}.final_attn_token_to_image", c // 2)
    affine(f"{transformer}.norm_final_attn", c)

    tokens = config.num_multimask_outputs + 1
    shapes["mask_decoder.iou_token.weight"] = (1, c)
    shapes["mask_decoder.mask_tokens.weight"] = (tokens, c)
    affine("mask_decoder.output_upscaling.0", c, c // 4, 2, 2, bias=c // 4)
    affine("mask_decoder.output_upscaling.1", c // 4)
    affine("mask_decoder.output_upscaling.3", c // 4, c // 8, 2, 2, bias=c // 8)
    for index in range(tokens):
        mlp(f"mask_decoder.output_hypernetworks_mlps.{index}", [c, c, c, c // 8])
    inner = [config.iou_head_hidden_dim] * (config.iou_head_depth - 1)
    mlp("mask_decoder.iou_prediction_head", [c, *inner, tokens])
    if config.hq:
        shapes["mask_decoder.hf_token.weight"] = (1, c)
        mlp("mask_decoder.hf_mlp", [c, c, c, c // 8])
        affine("mask_decoder.compress_vit_feat.0", d, c, 2, 2, bias=c)
        affine("mask_decoder.compress_vit_feat.1", c)
        affine("mask_decoder.compress_vit_feat.3", c, c // 8, 2, 2, bias=c // 8)
        affine("mask_decoder.embedding_encoder.0", c, c // 4, 2, 2, bias=c // 4)
        affine("mask_decoder.embedding_encoder.1", c // 4)
        affine("mask_decoder.embedding_encoder.3", c // 4, c // 8, 2, 2, bias=c // 8)
        affine("mask_decoder.embedding_maskfeature.0", c // 4, c // 8, 3, 3)
        affine("mask_decoder.embedding_maskfeature.1", c // 4)
        affine("mask_decoder.embedding_maskfeature.3", c // 8, c // 4, 3, 3)
    return shapes


def native_of(name: str, shape: Shape) -> tuple[str, tuple[int, ...]]:
    """A Meta key's parameter in this project, and the axes that bring its tensor there."""
    path, _, leaf = name.rpartition(".")
    if leaf != "weight":
        return name, tuple(range(len(shape)))
    if len(shape) == 1:
        return f"{path}.scale", (0,)
    if path.split(".")[1] in _EMBEDDINGS:
        return f"{path}.embedding", (0, 1)
    if len(shape) == 2:
        return f"{path}.kernel", (1, 0)
    if path.split(".")[1] in _TRANSPOSED_CONVOLUTIONS:
        return f"{path}.kernel", (2, 3, 0, 1)
    return f"{path}.kernel", (2, 3, 1, 0)


def meta_state(
    config: SamConfig,
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    finite: bool = False,
) -> dict[str, torch.Tensor]:
    """A state dict of random bits.

    Infinities and NaNs are among them, which must survive as they are, unless `finite` is asked.
    """
    rng = np.random.default_rng(seed)
    state = {}
    for name, shape in meta_shapes(config).items():
        size = int(np.prod(shape)) * dtype.itemsize
        bits = np.frombuffer(rng.bytes(size), np.uint8).copy()
        tensor = torch.from_numpy(bits).view(dtype).reshape(shape)
        state[name] = torch.nan_to_num(tensor) if finite else tensor
    return state


def save_meta(path: Path, config: SamConfig = TINY, **options: Any) -> dict[str, torch.Tensor]:
    """Save a `meta_state` as Meta does and return it."""
    state = meta_state(config, **options)
    torch.save(state, path)
    return state


def same_bits(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Whether two state dicts have the same names, dtypes, shapes and bits."""
    return a.keys() == b.keys() and all(
        a[name].dtype == b[name].dtype
        and a[name].shape == b[name].shape
        and torch.equal(bits(a[name]), bits(b[name]))
        for name in a
    )


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor's bytes."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)
