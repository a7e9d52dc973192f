"""The PyTorch peers of the encoder suite by name, and what each runs."""

TORCH = {
    "eager": "Meta's modules, all logits in memory, nothing compiled",
    "sdpa": "Meta's modules, SDPA with the bias in memory, nothing compiled",
    "compile": "sdpa under torch.compile",
    "compile-max-autotune": "sdpa under torch.compile(mode='max-autotune')",
    "flex": "global blocks by FlexAttention with the rel-pos in its score_mod, windows by SDPA, "
    "under torch.compile",
    "transformers": "SamModel.vision_encoder of transformers with SDPA, nothing compiled",
    "transformers-compile": "transformers under torch.compile",
    "transformers-eager": "SamModel.vision_encoder of transformers, eager attention",
}
