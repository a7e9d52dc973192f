"""Files appear whole or not at all, and what cannot be written is said before there is anything."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from sparsesam_jax.checkpoints import atomic


def write(path: Path, text: str = "new") -> None:
    with atomic.atomic_path(path) as temporary:
        temporary.write_text(text)


def test_a_link_stays_and_its_target_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    target, link, chain = tmp_path / "there" / "target", tmp_path / "link", tmp_path / "chain"
    target.write_text("old")
    link.symlink_to("there/target")
    chain.symlink_to(link)
    write(chain)
    assert chain.is_symlink() and link.is_symlink()
    assert target.read_text() == "new"
    target.unlink()  # a link whose target is yet to come
    write(link)
    assert target.read_text() == "new"
    assert not atomic.unfinished


def test_a_failure_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(RuntimeError), atomic.atomic_path(path) as temporary:
        temporary.write_text("half")
        assert atomic.unfinished == {temporary}
        raise RuntimeError
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("file", "old")]
    assert not atomic.unfinished


def test_errors_name_the_path_that_was_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "none" / "file"
    with pytest.raises(FileNotFoundError) as caught:
        write(path)
    assert caught.value.filename == str(path)
    (tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError) as caught:
        write(tmp_path / "folder")
    assert "partial" not in str(caught.value)


def test_what_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    atomic.check_file(tmp_path / "file")
    atomic.check_folder(tmp_path / "folder")
    atomic.check_folder(tmp_path / "new")
    assert [path.name for path in tmp_path.rglob("*")] == ["folder"]
    with pytest.raises(ValueError, match="output must lie in a folder that exists, got"):
        atomic.check_file(tmp_path / "none" / "file")
    with pytest.raises(ValueError, match=r"mask must be a file .* got '.*folder', a folder"):
        atomic.check_file(tmp_path / "folder", "mask")
    for path in (tmp_path / "none" / "new", "/dev/null", "/proc/new"):
        with pytest.raises(ValueError, match="out must be a folder, or a new one in a folder"):
            atomic.check_folder(path)
    with pytest.raises(ValueError, match="output must be a file that can be written, got '/proc"):
        atomic.check_file("/proc/mask.png")
    if os.geteuid():  # root may write everywhere
        (tmp_path / "folder").chmod(0o500)
        with pytest.raises(ValueError, match="Permission denied"):
            atomic.check_folder(tmp_path / "folder")
