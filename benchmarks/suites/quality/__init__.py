"""What sparsity costs in quality: mIoU of box prompts on photos with masks."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

from typer import Option

from benchmarks.records import available_cpus
from sparsesam_jax.choices import Dtype, Implementation, check_choice


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What `quality` measures on; the boxes are those of the masks."""

    images: Annotated[Path, Option(help="Folder of photos.")]
    masks: Annotated[Path, Option(help="Folder of their masks, equal stems, > 128.")]
    weights: Annotated[str, Option(help="vit_t or a converted file.")] = "vit_t"
    batch: Annotated[int, Option(help="Images an encoder call.")] = 8
    dtype: Annotated[str, Option(help="float32, bfloat16 or float16.")] = "float32"
    implementation: Annotated[Implementation, Option(help="Of the attention.")] = "auto"
    limit: Annotated[int | None, Option(help="Only the first N photos.")] = None
    # One batch is resized on the host while another is on the device.
    threads: Annotated[int, Option(help="Batches in flight. Without it: at most 8.")] = (
        dataclasses.field(default_factory=lambda: min(8, available_cpus()))
    )

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if isinstance(value, int | float) and value <= 0:
                raise ValueError(f"{name} must be positive, got {value}")
        check_choice("dtype", self.dtype, Dtype)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SweepOptions(Options):
    """What `sweep` measures on, and how much at a time."""

    batch: Annotated[int, Option(help="Images an encoder call.")] = 20
    dtype: str = "float32"
    implementation: Implementation = "xla"
    threads: int = dataclasses.field(default_factory=lambda: min(8, available_cpus()))
    compilers: Annotated[
        int, Option("--threads", "--processes", help="Programs that compile at a time.")
    ] = 12
    seconds: Annotated[float, Option(help="No variant is measured after them.")] = 270
    timeout: Annotated[
        float, Option(help="Seconds without a compiled variant that end the sweep.")
    ] = 240
