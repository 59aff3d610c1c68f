"""Files that are whole or not there."""

import errno
import os
import stat

import pytest

from omnet_torchrl.training.record.files import replace_file


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
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        replace_file(tmp_path / "file", b"content")
