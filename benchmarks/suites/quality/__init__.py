"""What sparsity costs in quality: mIoU of box prompts on photos with masks."""
