"""What all results in one folder share: written down, and compared when a run is resumed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sparsesam_jax.checkpoints.atomic import atomic_path


def settle(out: Path, settings: Mapping[str, Any], *, resume: bool) -> None:
    """Make the folder `out`, where need be, and write the settings to its `run.json`.

    Args:
        out: Folder for the results.
        settings: What JSON can hold.
        resume: Whether results that are there already are to be continued.

    Raises:
        ValueError: A run is to be resumed that had other settings.
    """
    path = out / "run.json"
    text = json.dumps(settings, indent=1)
    if resume and path.exists():
        earlier = json.loads(path.read_text("utf-8"))
        for name, value in json.loads(text).items():
            if earlier.get(name) != value:
                raise ValueError(
                    f"resume needs the {name} of the run in {out}, "
                    f"got {_short(value)} instead of {_short(earlier.get(name))}"
                )
    out.mkdir(exist_ok=True)
    with atomic_path(path) as temporary:
        temporary.write_text(text + "\n", "utf-8")


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) < 80 else f"{text[:77]}..."
