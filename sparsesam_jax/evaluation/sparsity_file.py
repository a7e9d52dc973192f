"""A `Sparsity` as a JSON file, as `sparsesam calibrate` writes and `--sparsity` reads it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from sparsesam_jax.checkpoints.atomic import atomic_path
from sparsesam_jax.config import Sparsity


def read_sparsity(path: Path) -> Sparsity:
    """Read one.

    Raises:
        ValueError: The file is missing or holds no JSON object of `Sparsity`'s fields.
    """
    try:
        return Sparsity(**json.loads(path.read_text("utf-8")))
    except (OSError, TypeError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(
            f"sparsity must be a JSON file of Sparsity's fields, got {str(path)!r}: {error}"
        ) from error


def write_sparsity(path: Path, sparsity: Sparsity) -> None:
    """Write one, whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(dataclasses.asdict(sparsity), indent=1) + "\n", "utf-8")
