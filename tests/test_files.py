"""Files that are whole or not there."""

import errno
import os
import stat

import pytest

from omnet_torchrl.training.record.files import CheckpointError, WriteError, fingerprint, read_file, replace_file


def refuse_folders(monkeypatch, number):
    fsync = os.fsync

    def call(file):
        if stat.S_ISDIR(os.fstat(file).st_mode):
            raise OSError(number, os.strerror(number))
        fsync(file)

    monkeypatch.setattr(os, "fsync", call)


def test_a_file_is_replaced_and_nothing_else_is_left(tmp_path):
    for content in (b"first", b"second"):
        replace_file(tmp_path / "file", content)
        assert (tmp_path / "file").read_bytes() == content
        assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_where_folders_cannot_be_flushed_the_file_is_there_all_the_same(tmp_path, monkeypatch):
    refuse_folders(monkeypatch, errno.EINVAL)
    replace_file(tmp_path / "file", b"content")
    assert (tmp_path / "file").read_bytes() == b"content"


def test_a_disk_that_fails_is_said(tmp_path, monkeypatch):
    refuse_folders(monkeypatch, errno.EIO)
    with pytest.raises(WriteError, match=rf"file can't be written \({os.strerror(errno.EIO)}\)"):
        replace_file(tmp_path / "file", b"content")


@pytest.mark.timeout(60)
def test_what_lies_under_the_temporary_name_is_neither_written_to_nor_waited_for(tmp_path):
    (tmp_path / "mine").write_bytes(b"mine")
    for make in (lambda path: path.symlink_to(tmp_path / "mine"), os.mkfifo):
        make(tmp_path / "file.tmp")
        replace_file(tmp_path / "file", b"content")
        assert (tmp_path / "file").read_bytes() == b"content"
    assert (tmp_path / "mine").read_bytes() == b"mine"
    (tmp_path / "file.tmp").mkdir()
    with pytest.raises(WriteError, match="file can't be written"):
        replace_file(tmp_path / "file", b"other")
    assert (tmp_path / "file").read_bytes() == b"content"


@pytest.mark.timeout(60)
def test_reading_raises_nothing_but_its_own_error(tmp_path):
    path = tmp_path / "file"
    for make, message in (
        (lambda: None, "file is missing"),
        (path.mkdir, "is no file"),
        (lambda: os.mkfifo(path), "is no file"),
        (lambda: path.symlink_to("nowhere"), "is no file"),
        (lambda: path.symlink_to("file"), "is no file"),
        (lambda: path.symlink_to("/dev/zero"), "is no file"),
        (lambda: path.write_bytes(b"contents"), "must have 7 bytes, got 8"),
        (lambda: path.write_bytes(b"c0ntent"), "is not what was written"),
        (lambda: path.write_bytes(b"") or os.truncate(path, 2**40), "must have 7 bytes"),
    ):
        make()
        with pytest.raises(CheckpointError, match=message):
            read_file(path, fingerprint(b"content"))
        if path.is_dir():
            path.rmdir()
        elif os.path.lexists(path):
            path.unlink()
    path.write_bytes(b"content")
    assert read_file(path, fingerprint(b"content")) == read_file(path) == b"content"
    with pytest.raises(CheckpointError, match="beneath is missing"):
        read_file(path / "beneath")
