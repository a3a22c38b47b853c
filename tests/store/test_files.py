"""A writer replaces nothing but what it looked at, and a place where it could not end is refused before it begins."""

import contextlib
import errno
import os
import re
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from published import snapshot

from bilinear_jax.store.files import (
    Kind,
    Place,
    atomic_file,
    atomic_folder,
    check_name,
    check_place,
    check_writable,
    put_file,
    replace_file,
)

RECORD, TEST = '{"format": "test"}', Kind("config.json", "test")


def write(folder: Path, text: str) -> None:
    (folder / "config.json").write_text(RECORD)
    (folder / "text").write_text(text)


@pytest.fixture
def out(tmp_path) -> Path:
    return tmp_path / "out"


@pytest.fixture
def older(out) -> Path:
    out.mkdir()
    write(out, "old")
    (out / "scope").mkdir()
    return out


def complete_in(error: pytest.ExceptionInfo) -> Path:
    """The folder that the message names. It holds the new text."""
    folder = Path(str(error.value).partition("complete in ")[2].partition(": ")[0])
    assert (folder / "text").read_text() == "new"
    return folder


def hidden(out: Path) -> list[str]:
    return [path.name for path in out.parent.iterdir() if path.name.startswith(".")]


# Something appears while it is written


def another_writer(out: Path) -> None:
    with atomic_folder(out) as folder:
        write(folder, "theirs")


def a_folder(out: Path) -> None:
    out.mkdir()
    (out / "thesis").write_text("three years of work")


def a_file(out: Path) -> None:
    out.write_text("three years of work")


def a_link(out: Path) -> None:
    (out.parent / "elsewhere").mkdir()
    out.symlink_to(out.parent / "elsewhere")


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("appears", [another_writer, a_folder, a_file, a_link])
def test_what_appeared_meanwhile_stays(out, appears, force):
    with pytest.raises(FileExistsError, match="no longer what it was when this began") as error:  # noqa: SIM117
        with atomic_folder(out, replace=TEST if force else None) as folder:
            write(folder, "new")
            appears(out)
            there = snapshot(out), out.is_symlink()
    assert (snapshot(out), out.is_symlink()) == there
    assert hidden(out) == [complete_in(error).name]


def test_an_empty_folder_that_appeared_is_filled(out):
    with atomic_folder(out) as folder:
        write(folder, "new")
        out.mkdir()
    assert (out / "text").read_text() == "new" and not hidden(out)


def test_of_many_writers_one_has_the_place(out):
    begin = threading.Barrier(8)

    def one(number: int) -> bool:
        try:
            with atomic_folder(out) as folder:
                write(folder, str(number))
                begin.wait()
        except FileExistsError as error:
            assert f"complete in {folder}" in str(error)
            assert (folder / "text").read_text() == str(number)
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(one, range(8)))
    assert sum(won) == 1 and (out / "text").read_text() == str(won.index(True))


# Force replaces what it looked at


def moved_and_another_came(out: Path) -> None:
    out.rename(out.parent / "moved")
    shutil.copytree(out.parent / "moved", out)


def a_file_was_added(out: Path) -> None:
    (out / "scope" / "mine").write_text("work of a night")


def a_file_was_changed(out: Path) -> None:
    (out / "text").write_text("OLD")
    os.utime(out / "text", ns=(0, 0))


def a_file_took_its_place(out: Path) -> None:
    shutil.rmtree(out)
    a_file(out)


def a_file_was_changed_in_secret(out: Path) -> None:
    """As a tool that writes in place and puts the time back."""
    before = (out / "text").stat()
    while (out / "text").stat().st_ctime_ns == before.st_ctime_ns:  # the clock of a file system has steps
        (out / "text").write_text("OLD")
        os.utime(out / "text", ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (out / "text").stat().st_mtime_ns == before.st_mtime_ns


@pytest.mark.parametrize(
    "change",
    [
        moved_and_another_came,
        a_file_was_added,
        a_file_was_changed,
        a_file_was_changed_in_secret,
        a_file_took_its_place,
    ],
)
def test_force_does_not_replace_what_changed(older, change):
    with pytest.raises(FileExistsError, match=r"it was changed\), so it stays as it is\. What was written") as error:  # noqa: SIM117
        with atomic_folder(older, replace=TEST) as folder:
            write(folder, "new")
            change(older)
            there = older.is_file() or snapshot(older)
    assert (older.is_file() or snapshot(older)) == there
    assert hidden(older) == [complete_in(error).name]


@pytest.mark.parametrize("change", [lambda out: None, shutil.rmtree])
def test_force_replaces_what_is_the_same_or_gone(older, change):
    with atomic_folder(older, replace=TEST) as folder:
        write(folder, "new")
        change(older)
    assert snapshot(older) == {"config.json": RECORD.encode(), "text": b"new"} and not hidden(older)


def test_what_cannot_be_deleted_is_named(older, monkeypatch):
    def refuse(path, **_):
        raise PermissionError(errno.EACCES, "Permission denied")

    with pytest.warns(UserWarning, match=r"out is complete, .* \(Permission denied\): delete ") as warned:  # noqa: SIM117
        with atomic_folder(older, replace=TEST) as folder:
            write(folder, "new")
            monkeypatch.setattr(shutil, "rmtree", refuse)
    aside = Path(str(warned[0].message).rpartition("): delete ")[2])
    assert [aside.name] == hidden(older) and (aside / "text").read_text() == "old"
    assert snapshot(older) == {"config.json": RECORD.encode(), "text": b"new"}


@pytest.mark.parametrize("gone", [False, True])
def test_work_is_not_said_to_be_where_it_is_not(tmp_path, gone):
    """The folder above is moved or deleted meanwhile."""
    out = tmp_path / "above" / "out"
    with pytest.raises(FileExistsError, match=f"no longer in {out.parent}: look for ") as error:  # noqa: SIM117
        with atomic_folder(out) as folder:
            write(folder, "new")
            out.parent.rename(tmp_path / "moved")
            if gone:
                shutil.rmtree(tmp_path / "moved")
    assert f"look for {folder.name} where" in str(error.value) and "is complete in" not in str(error.value)
    assert gone or (tmp_path / "moved" / folder.name / "text").read_text() == "new"


@pytest.mark.parametrize("there", ['{"format": "png"}', '{"format": null}', '{"format": ["test"]}', "{}"])
def test_force_replaces_only_its_own_kind(older, there):
    (older / "config.json").write_text(there)
    before = snapshot(older)
    with pytest.raises(FileExistsError, match=r"a folder with a config\.json of format 'test'\. It has format "):
        check_place(older, replace=TEST)
    assert snapshot(older) == before


def test_what_cannot_be_put_back_is_named(older, monkeypatch):
    """While the older folder is aside, another comes to its place."""
    rename = os.rename

    def and_then(source, target):
        rename(source, target)
        if Path(source) == older:
            a_folder(older)

    with pytest.raises(FileExistsError, match="What was there before is in ") as error:  # noqa: SIM117
        with atomic_folder(older, replace=TEST) as folder:
            write(folder, "new")
            monkeypatch.setattr(os, "rename", and_then)
    assert snapshot(older) == {"thesis": b"three years of work"}
    [aside] = [name for name in hidden(older) if ".old-" in name]
    assert str(older.parent / aside) in str(error.value)
    assert (older.parent / aside / "text").read_text() == "old"
    complete_in(error)


@pytest.mark.parametrize("fails", ["first", "second"])
def test_an_interrupt_at_the_end_leaves_what_was_there(older, monkeypatch, fails):
    rename, before = os.rename, snapshot(older)

    def interrupted(source, target):
        if (Path(source) == older) == (fails == "first"):
            monkeypatch.setattr(os, "rename", rename)
            raise KeyboardInterrupt
        rename(source, target)

    with contextlib.suppress(KeyboardInterrupt), atomic_folder(older, replace=TEST) as folder:
        write(folder, "new")
        monkeypatch.setattr(os, "rename", interrupted)
    assert snapshot(older) == before and not hidden(older)


def test_a_place_is_what_was_found_at_first(older):
    """``check_place`` long before the writer begins: what changes in between counts too."""
    place = check_place(older, replace=TEST)
    assert check_place(place) is place and place.path == older
    a_file_was_added(older)
    with pytest.raises(FileExistsError, match="it was changed"), atomic_folder(place, replace=TEST) as folder:
        write(folder, "new")
    assert (older / "scope" / "mine").exists()


# Odd folders


def test_the_working_folder_is_refused(older, monkeypatch):
    """Whoever stands in it would then stand in a deleted folder."""
    monkeypatch.chdir(older / "scope")
    for place, force, held in ((".", False, older / "scope"), ("..", True, older), (older, True, older)):
        with pytest.raises(
            OSError, match=f"^{held} cannot be replaced, because it holds the working folder: name a new"
        ):
            check_place(place, replace=TEST if force else None)
    assert check_place("new") == Place(older / "scope" / "new", None)
    assert not hidden(older) and not list((older / "scope").iterdir())


@pytest.mark.parametrize("number", [errno.EBUSY, errno.EPERM, errno.EACCES])
@pytest.mark.parametrize("force", [False, True])
def test_a_folder_that_the_system_does_not_move(tmp_path, older, monkeypatch, number, force):
    """What the root of a volume gives, and a folder of somebody else in a folder for all."""
    path = older if force else tmp_path / "empty"
    path.mkdir(exist_ok=True)

    def refuse(source, target):
        assert Path(source) == path and any(Path(target).iterdir()), "it could have been moved"
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "rename", refuse)
    with pytest.raises(OSError, match=f"{path} cannot be replaced .*Name a new folder in it"):  # noqa: SIM117
        with atomic_folder(path, replace=TEST if force else None):
            raise AssertionError("the work has begun")
    assert not hidden(older)


def test_an_empty_folder_in_a_layer_of_a_container(older, tmp_path, monkeypatch):
    """It cannot be moved, but replaced. An older folder must be moved aside, so that is refused."""
    rename = os.rename
    (tmp_path / "empty").mkdir()

    def layered(source, target):
        if Path(source) in (older, tmp_path / "empty"):
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        rename(source, target)

    monkeypatch.setattr(os, "rename", layered)
    with atomic_folder(tmp_path / "empty") as folder:
        write(folder, "new")
    assert (tmp_path / "empty" / "text").read_text() == "new"
    with pytest.raises(OSError, match=r"cannot be replaced \(Invalid cross-device link\)"):
        check_place(older, replace=TEST)


def test_a_parent_where_one_may_not_write(tmp_path, monkeypatch):
    """The tests may run as root, who may write anywhere."""
    (tmp_path / "parent" / "empty").mkdir(parents=True)
    mkdir = Path.mkdir

    def sealed(path, *args, **options):
        if path.parent == tmp_path / "parent":
            raise PermissionError(errno.EACCES, "Permission denied")
        mkdir(path, *args, **options)

    monkeypatch.setattr(Path, "mkdir", sealed)
    message = r"parent is not a folder with write permission \(Permission denied\)\. Name "
    for name, other in (("empty", "a new folder in it"), ("new", "another place"), ("new/below", "another place")):
        with pytest.raises(OSError, match=message + other):
            check_place(tmp_path / "parent" / name)
    with pytest.raises(OSError, match=message):
        check_writable(tmp_path / "parent" / "new")
    check_writable(tmp_path / "parent" / "empty" / "new")


def test_other_names(older, tmp_path):
    assert check_place(older / "scope" / "..", replace=TEST) == check_place(older, replace=TEST)
    with pytest.raises(FileExistsError, match="already exists"):
        check_place(older / "..")
    with pytest.raises(FileExistsError, match="/ already exists"):
        check_place("/")
    with pytest.raises(FileExistsError, match="text already exists"):
        check_place(older / "text")
    with pytest.raises(
        FileExistsError,
        match=r"force may replace here: a folder with a config\.json of format 'test'\. It has no such file",
    ):
        check_place(older / "text", replace=TEST)
    with pytest.raises(OSError, match=r"text is not a folder with write permission \(Not a directory\)"):
        check_place(older / "text" / "new")
    (tmp_path / "link").symlink_to(older / "scope")
    assert check_place(tmp_path / "link") == Place(older / "scope", None)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("a\\b", r"may not have \\ in it"),
        ("a\\b/new", r"may not have \\ in it"),
        ("gs:/new", "nor be gs:"),
        ("s3:", "nor be gs:"),
        ("caf\udce9", r"caf\\udce9 cannot be written \(it has characters that are not UTF-8\)"),
        ("n" * 256, "up to 255 bytes"),
        ("é" * 128 + "/new", "up to 255 bytes"),
        ("new/" + "n" * 256, "up to 255 bytes"),
        ("n/" * 2500, "File name too long"),
        ("loop", "[Ll]oop|symbolic links"),
        ("loop/new", "[Ll]oop|symbolic links"),
        ("a\0b", "null byte"),
    ],
)
def test_names_that_cannot_be_written(tmp_path, name, message):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for check in (check_name, check_place, check_writable):
        with pytest.raises(OSError, match=r"cannot be written .*name another place") as error:
            check(tmp_path / name)
        assert re.search(message, str(error.value))
    assert os.listdir(tmp_path) == ["loop"]


@pytest.mark.parametrize("name", ["n" * 255, "é" * 127, "😀" * 63, "gs", "a:b", "ab:", " "])
def test_names_that_can_be_written(tmp_path, name):
    with atomic_folder(tmp_path / name) as folder:
        write(folder, "old")
    with atomic_folder(tmp_path / name, replace=TEST) as folder:
        write(folder, "new")
    replace_file(tmp_path / name / name, "file")
    assert snapshot(tmp_path).keys() == {f"{name}/config.json", f"{name}/text", f"{name}/{name}"}


# Files


def test_two_writers_of_one_file(tmp_path, monkeypatch):
    """The quick one begins when the slow one has written, and ends first: both are whole, and the later stays."""
    write_text = Path.write_text

    def slowly(path, text, **options):
        monkeypatch.setattr(Path, "write_text", write_text)
        write_text(path, text, **options)
        replace_file(tmp_path / "file", "quick")
        assert (tmp_path / "file").read_text() == "quick"

    monkeypatch.setattr(Path, "write_text", slowly)
    replace_file(tmp_path / "file", "slow")
    assert snapshot(tmp_path) == {"file": b"slow"}


def test_an_interrupted_writer_of_a_file_leaves_nothing(tmp_path):
    (tmp_path / "file").write_text("old")
    with contextlib.suppress(KeyboardInterrupt), atomic_file(tmp_path / "file") as partial:
        partial.write_text("half")
        raise KeyboardInterrupt
    assert snapshot(tmp_path) == {"file": b"old"}


@pytest.mark.parametrize("links", [True, False])
def test_a_file_is_put_where_nothing_is(tmp_path, monkeypatch, links):
    def without(*_):
        raise OSError(errno.EPERM, "Operation not permitted")

    if not links:
        monkeypatch.setattr(os, "link", without)
    for name in ("one", "two"):
        (tmp_path / name).write_text(name)
    put_file(tmp_path / "one", tmp_path / "goal")
    with pytest.raises(FileExistsError):
        put_file(tmp_path / "two", tmp_path / "goal")
    assert snapshot(tmp_path) == {"goal": b"one", "two": b"two"}
