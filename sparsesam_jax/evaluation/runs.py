"""What `sparsesam evaluate` and `evaluate-coco` share: candidates, weights and a folder.

The folder's `run.json` says what all results in it have in common; a run that is resumed is
compared with it.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sparsesam_jax import methods
from sparsesam_jax.checkpoints.atomic import atomic_path
from sparsesam_jax.checkpoints.pretrained import Sam
from sparsesam_jax.checkpoints.sources import locate, size_in_bytes
from sparsesam_jax.choices import Dtype, Implementation, Padding, Products
from sparsesam_jax.evaluation.candidates import Candidate
from sparsesam_jax.predict.image_files import DEFAULT_READER, PhotoReader


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunOptions:
    """What is measured, and where the results go.

    Attributes:
        candidates: Methods and densities, in the order of the summary.
        out: Folder for the results.
        weights: Name or path of the weights.
        dtype: What is computed in; None is float32, or what the protocol has.
        implementation: As for `Sam`.
        products: As for `Sam`.
        padding: As for `SamPredictor`.
        resume: Whether to continue what `out` holds.
        reader: How photos are read.
    """

    candidates: tuple[Candidate, ...]
    out: Path
    weights: str = "vit_t"
    dtype: Dtype | None = None
    implementation: Implementation = "auto"
    products: Products = "dtype"
    padding: Padding = "square"
    resume: bool = False
    reader: PhotoReader = DEFAULT_READER

    def __post_init__(self) -> None:
        names = [(candidate.method, candidate.density) for candidate in self.candidates]
        if not names or len(names) != len(set(names)):
            raise ValueError(f"every method and density must be given once, got {names}")
        for candidate in self.candidates:
            if candidate.sparsity is None:
                methods.make(candidate.method, candidate.density)

    @property
    def compute_dtype(self) -> Dtype:
        """The dtype, the default where none was asked for."""
        return self.dtype or "float32"

    def sam(self) -> Sam:
        """The dense model.

        Raises:
            ValueError: As `Sam.from_pretrained`.
        """
        return Sam.from_pretrained(
            self.weights,
            dtype=self.compute_dtype,
            implementation=self.implementation,
            products=self.products,
        )

    def settle(self, images: Sequence[Any], own: Mapping[str, Any]) -> None:
        """Make the folder, where need be, and write its `run.json`.

        Args:
            images: What is measured on, by name or id.
            own: Further settings that results must share.

        Raises:
            ValueError: A run is to be resumed that had other settings.
        """
        settings = {
            "weights": self.weights,
            "weights_bytes": size_in_bytes(locate(self.weights)),
            "dtype": self.compute_dtype,
            "implementation": self.implementation,
            # Runs of before there was a choice have no such entry.
            **({} if self.padding == "square" else {"padding": self.padding}),
            **({} if self.products == "dtype" else {"products": self.products}),
            **own,
            "sparsities": {
                candidate.method: dataclasses.asdict(candidate.sparsity)
                for candidate in self.candidates
                if candidate.sparsity is not None
            },
            "images": list(images),
        }
        path = self.out / "run.json"
        text = json.dumps(settings, indent=1)
        if self.resume and path.exists():
            earlier = json.loads(path.read_text("utf-8"))
            now = json.loads(text)
            for name in earlier | now:
                if (value := now.get(name)) != earlier.get(name):
                    raise ValueError(
                        f"resume needs the {name} of the run in {self.out}, "
                        f"got {_short(value)} instead of {_short(earlier.get(name))}"
                    )
        self.out.mkdir(exist_ok=True)
        with atomic_path(path) as temporary:
            temporary.write_text(text + "\n", "utf-8")


def write_json(path: Path, value: object) -> None:
    """Write JSON, whole or not at all.

    Raises:
        ValueError: The value holds NaN or an infinity, which JSON has not.
    """
    text = json.dumps(value, indent=1, allow_nan=False)
    with atomic_path(path) as temporary:
        temporary.write_text(text + "\n", "utf-8")


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) < 80 else f"{text[:77]}..."
