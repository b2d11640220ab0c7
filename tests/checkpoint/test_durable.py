import errno
import hashlib
import os
import signal
import subprocess
import sys

import pytest

from halve.checkpoint import durable
from halve.checkpoint.durable import file_chunks, filling, make_directory, move_file, sha256_of, write_file, writing
from halve.errors import HalveError, UnreadableFileError


def test_a_file_is_what_was_given_and_its_hash_is_returned(tmp_path):
    path = tmp_path / "new" / "deep" / "file"
    assert write_file(path, [b"ab", memoryview(b"c")], "file") == hashlib.sha256(b"abc").hexdigest()
    assert path.read_bytes() == b"abc"
    assert sha256_of(path) == hashlib.sha256(b"abc").hexdigest()
    assert b"".join(file_chunks(path)) == b"abc"
    assert os.listdir(path.parent) == ["file"]  # noqa: PTH208 - hidden ones too


def test_a_file_that_fails_leaves_what_was_there(tmp_path):
    path = tmp_path / "file"
    write_file(path, [b"old"], "file")

    def broken():
        yield b"new"
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        write_file(path, broken(), "file")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]  # noqa: PTH208


def test_what_a_killed_process_left_is_no_obstacle(tmp_path):
    (tmp_path / ".file.tmp").write_bytes(b"half")
    write_file(tmp_path / "file", [b"whole"], "file")
    assert os.listdir(tmp_path) == ["file"]  # noqa: PTH208


def test_content_is_flushed_before_its_name_and_the_name_after(tmp_path, monkeypatch):
    """Power loss cannot be tried here, so the order of calls stands for it."""
    events = []
    fsync, replace = os.fsync, type(tmp_path).replace

    def note_fsync(descriptor):
        events.append(("fsync", os.readlink(f"/proc/self/fd/{descriptor}")))  # noqa: PTH115
        fsync(descriptor)

    def note_replace(path, target):
        events.append(("rename", str(target)))
        return replace(path, target)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(type(tmp_path), "replace", note_replace)
    write_file(tmp_path / "file", [b"x"], "file")
    assert events == [
        ("fsync", str(tmp_path / ".file.tmp")),
        ("rename", str(tmp_path / "file")),
        ("fsync", str(tmp_path)),
    ]
    events.clear()
    move_file(tmp_path / "file", tmp_path / "sub" / "file", "file")
    assert events == [
        ("fsync", str(tmp_path)),  # the new directory's name
        ("rename", str(tmp_path / "sub" / "file")),
        ("fsync", str(tmp_path / "sub")),
    ]
    events.clear()
    make_directory(tmp_path / "a" / "b")
    assert events == [("fsync", str(tmp_path)), ("fsync", str(tmp_path / "a"))]


@pytest.mark.parametrize(
    ("code", "hint"), [(errno.ENOSPC, "free some space and call again"), (errno.EIO, "check the volume and call again")]
)
def test_a_volume_that_fails_is_one_sentence(tmp_path, code, hint):
    with pytest.raises(HalveError, match=rf"^writing .* failed \({os.strerror(code)}\): {hint}$"), writing(tmp_path):
        raise OSError(code, os.strerror(code))


def test_crash_points_are_counted_logged_and_deadly(tmp_path, monkeypatch):
    log = tmp_path / "log"
    monkeypatch.setattr(durable, "_passed", durable.Counter())
    monkeypatch.setenv(durable.CRASH_LOG, str(log))
    durable.crash_point("a")
    durable.crash_point("b")
    durable.crash_point("a")
    assert log.read_text(encoding="utf-8").split() == ["a@1", "b@1", "a@2"]
    code = (
        "from halve.checkpoint.durable import crash_point as c; c('a'); print('one', flush=True); c('a'); print('two')"
    )
    environment = {**os.environ, durable.CRASH_POINT: "a@2"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (-signal.SIGKILL, "one\n")


def fill(out, *contents):
    with filling(out) as write:
        return [write(f"below/{number}", content, "file") for number, content in enumerate(contents)]


def test_a_directory_that_cannot_be_filled_is_taken_back(tmp_path):
    def broken():
        assert list(tmp_path.rglob("*0"))
        yield b"half"
        raise ZeroDivisionError

    assert fill(tmp_path / "whole", [b"1"]) == [hashlib.sha256(b"1").hexdigest()]
    (tmp_path / "empty").mkdir()
    for out in (tmp_path / "new" / "deep", tmp_path / "empty"):
        with pytest.raises(ZeroDivisionError):
            fill(out, [b"1"], [b"2"], broken())
    assert sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")) == [
        "empty",
        "whole",
        "whole/below",
        "whole/below/0",
    ]


def test_what_cannot_be_read_while_writing_is_named_and_not_what_is_written(tmp_path):
    source = tmp_path / "source"
    for read in (lambda: fill(tmp_path / "new", file_chunks(source)), lambda: sha256_of(source)):
        with pytest.raises(UnreadableFileError, match=r"source cannot be read \(No such file or directory\): make"):
            read()
    assert not (tmp_path / "new").exists()


def test_a_full_volume_is_one_sentence_and_nothing_is_left(tmp_path, monkeypatch):
    def full(file, chunk):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(durable, "_append", full)
    with pytest.raises(HalveError, match=r"new failed \(No space left"):
        fill(tmp_path / "new", [b"1"])
    assert not (tmp_path / "new").exists()
