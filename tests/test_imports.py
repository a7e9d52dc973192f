"""Who may import whom: one table of layers, no import upwards, no circle."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]

# From the ground up; a room may import from those below it and from itself.
LAYERS = [
    {"pallas_kernels"},
    {"sparsesam_jax.choices"},
    {"sparsesam_jax.config"},
    {"sparsesam_jax.sparsity"},
    {"sparsesam_jax.model"},
    {"sparsesam_jax.checkpoints"},
    {"sparsesam_jax.predict"},
    {"sparsesam_jax.datasets"},
    {"sparsesam_jax.segment_anything", "sparsesam_jax.methods"},
    {"sparsesam_jax.evaluation"},
    {"sparsesam_jax.tuning"},
    {"sparsesam_jax.cli"},
    {"sparsesam_jax", "sparsesam_jax.__main__"},  # the package hands out names of all its rooms
    {"convert"},
    {"benchmarks"},
]
LEVEL = {room: level for level, rooms in enumerate(LAYERS) for room in rooms}


def modules() -> dict[str, Path]:
    """Every module of the project by its name."""
    found = {}
    for package in ("pallas_kernels", "sparsesam_jax", "convert", "benchmarks"):
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def imported(name: str) -> set[str]:
    """The project's modules that a module imports anywhere in its code, for types too."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[name].read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name in MODULES}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} imports relative to itself"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found |= {inner if inner in MODULES else str(node.module)} & MODULES.keys()
    return found - {name}


IMPORTS = {name: imported(name) for name in MODULES}


def room(name: str) -> str:
    """The room of a module: the longest entry of the table that it lies in."""
    parts = name.split(".")
    names = (".".join(parts[:length]) for length in range(len(parts), 0, -1))
    # The package's own name stands for its `__init__` alone.
    return next(n for n in names if n in LEVEL and (n == name or n != "sparsesam_jax"))


def test_every_module_has_a_room():
    for name in MODULES:
        assert room(name) in LEVEL
    used = {room(name) for name in MODULES}
    assert used == LEVEL.keys(), used ^ LEVEL.keys()


def test_no_import_goes_upwards_or_across():
    wrong = []
    for name, targets in IMPORTS.items():
        if name in ("sparsesam_jax", "sparsesam_jax.__main__"):
            continue  # lazily, and for types alone
        for target in targets:
            own, other = room(name), room(target)
            if own != other and LEVEL[other] >= LEVEL[own] and other != "sparsesam_jax":
                wrong.append(f"{name} -> {target}")
    assert not wrong, wrong


def test_no_circle():
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join([*path[path.index(name) :], name])
        if name in done:
            return
        for target in sorted(IMPORTS[name]):
            visit(target, (*path, name))
        done.add(name)

    for name in MODULES:
        if name != "sparsesam_jax":  # whose names of its rooms are lazy
            visit(name, ("",))


def test_kernels_know_no_model_and_the_package_no_torch():
    for name in MODULES:
        if name.startswith("pallas_kernels"):
            assert not any(target.startswith("sparsesam_jax") for target in IMPORTS[name])
    users = set()
    for name, path in MODULES.items():
        tree = ast.parse(path.read_text("utf-8"))
        top = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
        for node in top:
            names = [alias.name for alias in node.names]
            names = names if isinstance(node, ast.Import) else [str(node.module)]
            if any(n.split(".")[0] == "torch" for n in names):
                users.add(name)
    users = {name for name in users if not name.startswith("benchmarks")}
    assert users <= {"sparsesam_jax.checkpoints.torch_checkpoint"}
