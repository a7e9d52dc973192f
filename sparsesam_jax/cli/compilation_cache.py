"""What is compiled is kept in the user's cache folder, so that the next command starts fast."""

from __future__ import annotations

import importlib.metadata
import os
import sys
from pathlib import Path
from typing import Any

OFF = "off"
_DIRECTORY, _ENABLED = "jax_compilation_cache_dir", "jax_enable_compilation_cache"
# JAX keeps by default only what took a second to compile; a command has many smaller programs.
_KEEP_ALL = {
    "jax_persistent_cache_min_compile_time_secs": 0,
    "jax_persistent_cache_min_entry_size_bytes": -1,
}


def configure(choice: str | None) -> str | None:
    """Tell JAX where to keep what it compiles.

    Args:
        choice: A folder, or `off`. None leaves it to JAX's variables, where they are set, and to
            the process, where it has imported JAX already; else it is `default_folder()`.

    Returns:
        Why there is no cache although it is not `off`: that is no reason to fail.
    """
    settled = _DIRECTORY.upper() in os.environ or _ENABLED.upper() in os.environ
    if choice is None and (settled or "jax" in sys.modules):
        return None
    if choice == OFF:
        _set({_ENABLED: False})
        return None
    try:
        folder = default_folder() if choice is None else Path(choice).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(f"{folder} is not writable")
    except (OSError, RuntimeError, ValueError) as error:  # RuntimeError: there is no home
        _set({_ENABLED: False})
        return f"no compilation cache: {error}"
    unset = {name: value for name, value in _KEEP_ALL.items() if name.upper() not in os.environ}
    _set({_ENABLED: True, _DIRECTORY: str(folder)} | unset)
    return None


def default_folder() -> Path:
    """The cache of this version of JAX in the user's cache folder."""
    import platformdirs

    version = importlib.metadata.version("jax")
    return platformdirs.user_cache_path("sparsesam", appauthor=False) / f"jax-{version}"


def _set(options: dict[str, Any]) -> None:
    jax = sys.modules.get("jax")
    for name, value in options.items():
        if jax is None:
            os.environ[name.upper()] = str(value)  # JAX reads it when it is imported
        else:
            jax.config.update(name, value)
