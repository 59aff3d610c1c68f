"""Checkpoints: complete or none, whatever happens while one is written or to its files afterwards."""

import errno
import io
import json
import os
import pickle
import random
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from tensordict import TensorDict
from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer

from omnet_torchrl.training.record import checkpoint
from omnet_torchrl.training.record.checkpoint import Checkpointer, load_replay
from omnet_torchrl.training.record.files import CheckpointError, WriteError, fingerprint


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch):
    """No test takes the power away: waiting for the disk would only make them slow."""
    monkeypatch.setattr(os, "fsync", lambda file: None)


def make_buffer(capacity=50):
    return TensorDictReplayBuffer(storage=LazyTensorStorage(capacity))


def fill(buffer, start, stop):
    """Transitions that tell their own number."""
    if start == stop:
        return
    number = torch.arange(start, stop, dtype=torch.float32)
    done = (number % 7 == 0)[:, None]
    data = {"observation": number[:, None].expand(-1, 3) + 0.5, "action": -number[:, None]}
    following = {"observation": number[:, None].expand(-1, 3) + 1.5, "reward": 2 * number[:, None], "done": done}
    buffer.extend(TensorDict({**data, "next": following}, batch_size=len(number)))


def state_of(buffer, frames):
    return {"frames": frames, "weight": torch.full((3,), float(frames)), "writer": dict(buffer.writer.state_dict())}


def save(checkpointer, buffer, frames):
    checkpointer.save(frames, state_of(buffer, frames), buffer)


def load(path, capacity=50):
    state, files = Checkpointer(path).load()
    buffer = make_buffer(capacity)
    load_replay(buffer, files, state["writer"])
    return state, buffer


def assert_same(a, b):
    assert len(a) == len(b)
    assert a.write_count == b.write_count
    assert a.writer.state_dict() == b.writer.state_dict()
    for key, value in a.storage.get(slice(0, len(a))).items(True, True):
        assert torch.equal(value, b.storage.get(slice(0, len(b))).get(key)), key
    # They go on alike, and are sampled alike.
    start = a.write_count
    for buffer in (a, b):
        fill(buffer, start, start + 13)
        buffer.set_rng(torch.Generator().manual_seed(3))
    assert torch.equal(a.sample(64)["observation"], b.sample(64)["observation"])


def series(path, *frames, capacity=50, keep=2):
    """A run that saved at each of ``frames``; a transition is written per frame."""
    checkpointer, buffer = Checkpointer(path, keep), make_buffer(capacity)
    for before, after in zip((0, *frames), frames, strict=False):
        fill(buffer, before, after)
        save(checkpointer, buffer, after)
    return checkpointer, buffer


def names(path, pattern="*"):
    return sorted(file.name for file in path.glob(pattern))


def identity(path):
    return {file.name: (file.stat().st_ino, file.stat().st_mtime_ns) for file in path.iterdir()}


def size(path):
    return sum(file.stat().st_size for file in path.iterdir())


# Round trips.


def test_there_is_nothing_to_load_where_nothing_was_saved(tmp_path):
    assert Checkpointer(tmp_path / "none").load() is None
    assert Checkpointer(tmp_path).load() is None


def test_what_was_saved_is_loaded(tmp_path):
    checkpointer, buffer = Checkpointer(tmp_path / "deep" / "er"), make_buffer()
    fill(buffer, 0, 20)
    generator = torch.Generator().manual_seed(1)
    state = {
        "numbers": {"int": 3, "float": 0.1, "nan": float("nan"), "none": None, "bool": True, "text": "ö"},
        "list": [torch.arange(3), {"double": torch.tensor(1e-300, dtype=torch.float64)}],
        "generator": generator.get_state(),
        "mask": torch.tensor([True, False]),
    }
    checkpointer.save(20, state, buffer)
    found, files = Checkpointer(tmp_path / "deep" / "er").load()
    assert len(files) == 1
    assert repr(found) == repr(state)
    assert found["list"][1]["double"].dtype == torch.float64


def test_a_checkpoint_needs_no_buffer(tmp_path):
    Checkpointer(tmp_path).save(3, {"frames": 3})
    assert Checkpointer(tmp_path).load() == ({"frames": 3}, [])


def test_an_empty_buffer_comes_back_empty(tmp_path):
    _, buffer = series(tmp_path, 0)
    state, found = load(tmp_path)
    assert state["frames"] == 0
    assert len(found) == len(buffer) == 0


@pytest.mark.parametrize(
    "frames", [(10,), (10, 20, 30), (50,), (7, 50, 51), (40, 80), (120,), (10, 130), tuple(range(9, 200, 9))]
)
def test_the_buffer_comes_back_row_for_row(frames, tmp_path):
    """Below its capacity of 50, just full, gone round once and often, and with a save that outgrows it at once."""
    _, buffer = series(tmp_path, *frames)
    state, found = load(tmp_path)
    assert torch.equal(state["weight"], torch.full((3,), float(frames[-1])))
    assert_same(buffer, found)


@pytest.mark.parametrize("second", [55, 60, 70, 140])
def test_a_run_that_was_resumed_saves_on(second, tmp_path):
    series(tmp_path, 20, 40)
    _, buffer = load(tmp_path)
    fill(buffer, 40, second)
    checkpointer = Checkpointer(tmp_path)
    checkpointer.load()
    save(checkpointer, buffer, second)
    assert_same(buffer, load(tmp_path)[1])


@pytest.mark.parametrize(("written", "capacity"), [(30, 80), (50, 80), (50, 50)])
def test_a_full_buffer_goes_on_in_a_larger_one(written, capacity, tmp_path):
    """A run whose ``total_frames`` is raised has a larger buffer."""
    series(tmp_path, 20, written)
    _, found = load(tmp_path, capacity)
    expected = make_buffer(capacity)
    fill(expected, 0, written)
    assert_same(expected, found)


def test_a_buffer_that_has_gone_round_fits_no_larger_one(tmp_path):
    series(tmp_path, 30, 60, 90)
    with pytest.raises(ValueError, match="capacity"):
        load(tmp_path, capacity=80)


# What a save costs.


def test_a_save_writes_only_what_is_new(tmp_path):
    checkpointer, buffer = series(tmp_path, 10, 20)
    before = identity(tmp_path)
    fill(buffer, 20, 30)
    save(checkpointer, buffer, 30)
    after = identity(tmp_path)
    assert len(names(tmp_path, "replay_*")) == 3
    new = [name for name in after if name not in before]
    assert sorted(name.split("_")[0] for name in new) == ["checkpoint", "replay", "state"]
    kept = [name for name in before if name.startswith("replay")]
    assert {name: after[name] for name in kept} == {name: before[name] for name in kept}


def test_a_save_without_new_transitions_writes_no_segment(tmp_path):
    checkpointer, buffer = series(tmp_path, 10)
    save(checkpointer, buffer, 11)
    assert len(names(tmp_path, "replay_*")) == 1
    assert_same(buffer, load(tmp_path)[1])


def test_the_disk_holds_little_more_than_the_buffer(tmp_path):
    """100 saves of a buffer that goes round five times; rows are large enough that a file's own overhead is not what counts."""
    capacity, step = 1_000, 50
    checkpointer, buffer = Checkpointer(tmp_path), make_buffer(capacity)
    rows = torch.rand(step, 500)
    for frames in range(step, 5 * capacity + 1, step):
        buffer.extend(TensorDict({"observation": rows}, batch_size=step))
        checkpointer.save(frames, {"frames": frames}, buffer)
        assert size(tmp_path) < 1.2 * capacity * rows[0].nbytes


@pytest.mark.parametrize("keep", [2, 3])
def test_older_checkpoints_and_files_that_nobody_names_are_deleted(keep, tmp_path):
    series(tmp_path, *range(10, 201, 10), keep=keep)
    kept = [f"{frames:09d}" for frames in range(200 - 10 * (keep - 1), 201, 10)]
    assert names(tmp_path, "checkpoint_*") == [f"checkpoint_{frames}.json" for frames in kept]
    assert [name[:15] for name in names(tmp_path, "state_*")] == [f"state_{frames}" for frames in kept]
    manifests = [json.loads(path.read_text()) for path in tmp_path.glob("*.json")]
    named = {segment["file"] for manifest in manifests for segment in manifest["replay"]}
    assert set(names(tmp_path, "replay_*")) == named
    assert set(names(tmp_path)) == {*names(tmp_path, "*.json"), *names(tmp_path, "state_*"), *named}


def test_files_of_the_user_stay(tmp_path):
    checkpointer, buffer = series(tmp_path, 10)
    (tmp_path / "notes.txt").write_text("best so far")
    (tmp_path / "copies").mkdir()
    fill(buffer, 10, 20)
    save(checkpointer, buffer, 20)
    assert {"notes.txt", "copies"} <= set(names(tmp_path))


# Damage.


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def empty(path):
    path.write_bytes(b"")


DAMAGES = [cut, flip, empty, Path.unlink]


def newest(path, kind):
    return sorted(path.glob(f"{kind}_*"))[-1]


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("kind", ["state", "replay", "checkpoint"])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(kind, damage, tmp_path):
    series(tmp_path, 10, 20, 30)
    file = newest(tmp_path, kind)
    damage(file)
    if kind == "checkpoint" and damage is Path.unlink:
        state, buffer = load(tmp_path)  # as if the save had not got so far
    else:
        with pytest.warns(UserWarning, match=file.name):
            state, buffer = load(tmp_path)
    assert state["frames"] == 20
    expected = make_buffer()
    fill(expected, 0, 20)
    assert_same(expected, buffer)


@pytest.mark.parametrize("content", [b"{", b"[]", b"{}", b"null", b"\xff\xfe", b'{"format": 1}', b'{"format": 3}'])
def test_a_torn_manifest_falls_back(content, tmp_path):
    series(tmp_path, 10, 20)
    newest(tmp_path, "checkpoint").write_bytes(content)
    with pytest.warns(UserWarning, match=r"checkpoint_000000020\.json"):
        assert load(tmp_path)[0]["frames"] == 10


@pytest.mark.parametrize("number", [1, 2, 3, 4, 6])
def test_another_format_is_refused(number, tmp_path):
    series(tmp_path, 10)
    manifest = newest(tmp_path, "checkpoint")
    manifest.write_text(manifest.read_text().replace('"format": 5', f'"format": {number}'))
    for replay in (True, False):
        with pytest.raises(CheckpointError, match=f"expected checkpoint format 5, got {number}"):
            Checkpointer(tmp_path).load(replay=replay)


@pytest.mark.parametrize("damage", DAMAGES)
def test_where_none_is_whole_it_is_an_error_that_names_the_files(damage, tmp_path):
    series(tmp_path, 10, 20)
    first = sorted(tmp_path.glob("replay_*"))[0]  # which both have
    damage(first)
    with pytest.raises(CheckpointError, match=first.name) as error:
        Checkpointer(tmp_path).load()
    assert "checkpoint_000000010.json" in str(error.value)
    assert "checkpoint_000000020.json" in str(error.value)


def test_nothing_is_deleted_or_changed_by_loading(tmp_path):
    series(tmp_path, 10, 20)
    flip(newest(tmp_path, "state"))
    before = identity(tmp_path)
    with pytest.warns(UserWarning, match="damaged"):
        Checkpointer(tmp_path).load()
    assert identity(tmp_path) == before


@pytest.mark.parametrize("keep", [2, 3])
@pytest.mark.parametrize("position", [0, 1, 2])
@pytest.mark.parametrize("damage", [cut, flip, empty])
@pytest.mark.parametrize("kind", ["state", "replay", "checkpoint"])
def test_a_run_goes_on_from_what_is_whole_and_saves(kind, damage, position, keep, tmp_path):
    """A damage anywhere, seen or not, neither stops later saves nor gets into them."""
    series(tmp_path, 10, 20, 30, keep=3)
    damage(sorted(tmp_path.glob(f"{kind}_*"))[position])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            state, buffer = load(tmp_path)
        except CheckpointError:
            assert (kind, position) == ("replay", 0)
            return
        checkpointer = Checkpointer(tmp_path, keep)
        checkpointer.load()
    checkpointer.discard_after(state["frames"])
    for frames in range(state["frames"] + 10, 71, 10):
        fill(buffer, frames - 10, frames)
        save(checkpointer, buffer, frames)
        assert load(tmp_path)[0]["frames"] == frames
    assert_same(buffer, load(tmp_path)[1])
    assert len(names(tmp_path, "*.json")) == keep


def test_a_run_that_goes_on_from_an_earlier_checkpoint_forgets_the_later_ones(tmp_path):
    series(tmp_path, 10, 20, 30)
    checkpointer = Checkpointer(tmp_path)
    flip(newest(tmp_path, "state"))
    with pytest.warns(UserWarning, match="damaged"):
        checkpointer.load()
    checkpointer.discard_after(20)
    assert Checkpointer(tmp_path).load()[0]["frames"] == 20


def test_a_new_run_does_not_mix_with_the_checkpoints_of_another(tmp_path):
    series(tmp_path, 10, 20)
    before = identity(tmp_path)
    buffer = make_buffer()
    fill(buffer, 100, 115)
    with pytest.raises(ValueError, match="load"):
        save(Checkpointer(tmp_path), buffer, 15)
    assert identity(tmp_path) == before


# A process that ends in the middle of a save, and a full disk.


class Killed(BaseException):
    pass


class _File(io.FileIO):
    """A file whose write, if its turn has come, gets only half of it done."""

    def __init__(self, path, mode, tick):
        super().__init__(path, mode.replace("b", ""))
        self.tick = tick

    def write(self, content):
        half = bytes(content)[: len(content) // 2]
        try:
            self.tick()
        except BaseException:
            super().write(half)
            raise
        return super().write(content)


def interfere(monkeypatch, n, error):
    """Let the ``n``-th of all calls that change or wait for the disk fail; gives the list of calls made."""
    calls = []

    def tick():
        calls.append(n)
        if len(calls) == n:
            raise error

    def wrapped(function):
        def call(*args, **kwargs):
            tick()
            return function(*args, **kwargs)

        return call

    for name in ("replace", "fsync", "unlink"):
        monkeypatch.setattr(os, name, wrapped(getattr(os, name)))
    monkeypatch.setattr(Path, "unlink", wrapped(Path.unlink))
    opened = Path.open
    monkeypatch.setattr(
        Path, "open", lambda path, mode="r", **kw: _File(path, mode, tick) if "x" in mode else opened(path, mode, **kw)
    )
    return calls


def failing_save(checkpointer, buffer, frames, n, error):
    with pytest.MonkeyPatch.context() as patch:
        interfere(patch, n, error)
        with pytest.raises(type(error)):
            save(checkpointer, buffer, frames)


def calls_of_a_save(tmp_path):
    checkpointer, buffer = series(tmp_path / "count", 10, 20, 30)
    with pytest.MonkeyPatch.context() as patch:
        calls = interfere(patch, 0, None)
        fill(buffer, 30, 40)
        save(checkpointer, buffer, 40)
    assert len(calls) > 10
    return len(calls)


@pytest.mark.parametrize("error", [Killed(), OSError(errno.ENOSPC, "No space left on device")], ids=["killed", "disk full"])
def test_a_save_that_fails_anywhere_leaves_a_checkpoint_to_go_on_from(error, tmp_path):
    count = calls_of_a_save(tmp_path)
    reached = set()
    for n in range(1, count + 1):
        path = tmp_path / str(n)
        checkpointer, buffer = series(path, 10, 20, 30)
        fill(buffer, 30, 40)
        failing_save(checkpointer, buffer, 40, n, error)
        state, found = load(path)  # a warning would be an error
        reached.add(state["frames"])
        expected = make_buffer()
        fill(expected, 0, state["frames"])
        assert_same(expected, found)
        # Going on from there, or in the same process, leaves no garbage.
        for again, goes_on in ((Checkpointer(path), load(path)[1]), (checkpointer, buffer)):
            if again is not checkpointer:
                again.load()
            fill(goes_on, goes_on.write_count, 60)
            save(again, goes_on, 60 if again is not checkpointer else 61)
            assert not names(path, "*.tmp")
            manifests = [json.loads(file.read_text()) for file in path.glob("*.json")]
            assert set(names(path, "replay_*")) == {s["file"] for m in manifests for s in m["replay"]}
            assert len(names(path, "state_*")) == len(manifests) == 2
            assert_same(goes_on, load(path)[1])
    assert reached == {30, 40}


def test_the_first_save_that_fails_leaves_nothing_to_load(tmp_path):
    checkpointer, buffer = Checkpointer(tmp_path), make_buffer()
    fill(buffer, 0, 10)
    for n in range(1, 9):  # up to the rename of the manifest, which is the ninth
        failing_save(checkpointer, buffer, 10, n, Killed())
        assert Checkpointer(tmp_path).load() is None
    save(checkpointer, buffer, 10)
    assert_same(buffer, load(tmp_path)[1])


def test_a_file_of_the_same_name_that_an_interrupted_save_has_left_is_replaced(tmp_path):
    """The same content has the same name: what a killed process or a damaged disk has left there must not be trusted."""
    series(tmp_path / "a", 10, 20)
    (segment,) = [name for name in names(tmp_path / "a", "replay_*") if "000000010_000000020" in name]
    checkpointer, buffer = series(tmp_path / "b", 10)
    (tmp_path / "b" / segment).write_bytes(b"half of it")
    (tmp_path / "b" / f"{segment}.tmp").write_bytes(b"less of it")
    fill(buffer, 10, 20)
    save(checkpointer, buffer, 20)
    assert (tmp_path / "b" / segment).read_bytes() == (tmp_path / "a" / segment).read_bytes()
    assert_same(buffer, load(tmp_path / "b")[1])


# Trust.


def seal(path, manifest):
    """A manifest with a hash that fits, whatever it says."""
    path.write_text(json.dumps({**manifest, "sha256": checkpoint.seal(manifest)}))


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


def plant(path, kind, payload):
    """A file that runs code when unpickled, with a manifest that vouches for it."""
    manifest_path = newest(path, "checkpoint")
    manifest = json.loads(manifest_path.read_text())
    entry = manifest["state"] if kind == "state" else manifest["replay"][-1]
    memory = io.BytesIO()
    if payload == "torch":
        torch.save({"data": Malicious(path / "pwned"), "start": 0}, memory)
    else:
        memory.write(pickle.dumps(Malicious(path / "pwned"), protocol=2))
    (path / entry["file"]).write_bytes(memory.getvalue())
    entry |= fingerprint(memory.getvalue())
    seal(manifest_path, manifest)


@pytest.mark.parametrize("payload", ["torch", "pickle"])
def test_a_state_that_runs_code_is_refused(payload, tmp_path):
    series(tmp_path, 10, 20)
    plant(tmp_path, "state", payload)
    with pytest.warns(UserWarning, match="passed over"):
        assert Checkpointer(tmp_path).load()[0]["frames"] == 10
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize("payload", ["torch", "pickle"])
def test_a_segment_that_runs_code_is_refused(payload, tmp_path):
    _, buffer = series(tmp_path, 10, 20)
    (file,) = tmp_path.glob("replay_000000010_*")
    plant(tmp_path, "replay", payload)
    with pytest.warns(UserWarning, match=f"passed over .*{file.name} does not hold tensors, numbers and strings"):
        assert load(tmp_path)[0]["frames"] == 10
    with pytest.raises(CheckpointError, match="does not hold tensors"):
        load_replay(make_buffer(), [file], buffer.writer.state_dict())
    assert not (tmp_path / "pwned").exists()


# What a manifest says, and what its files hold.

OTHER_LISTS = {
    "empty": lambda segments: [],
    "without the first": lambda segments: segments[1:],
    "with a gap": lambda segments: [segments[0], segments[2]],
    "without the last": lambda segments: segments[:-1],
    "doubled": lambda segments: [segments[0], *segments],
    "turned": lambda segments: segments[::-1],
    "ends later": lambda segments: [*segments[:-1], {**segments[-1], "stop": 34}],
    "begins earlier": lambda segments: [{**segments[0], "start": -1}, *segments[1:]],
    "too long": lambda segments: [*segments, {**segments[-1], "start": 30, "stop": 40}],
}


@pytest.mark.parametrize("other", OTHER_LISTS)
def test_segments_that_do_not_cover_the_buffer_once_and_in_order_are_passed_over(other, tmp_path):
    series(tmp_path, 10, 20, 30)
    path = newest(tmp_path, "checkpoint")
    manifest = json.loads(path.read_text())
    seal(path, manifest)
    assert load(tmp_path)[0]["frames"] == 30
    seal(path, {**manifest, "replay": OTHER_LISTS[other](manifest["replay"])})
    with pytest.warns(UserWarning, match=r"passed over .* checkpoint_000000030\.json: .*(replay_|its segments)"):
        state, buffer = load(tmp_path)
    assert state["frames"] == 20
    assert len(buffer) == 20


CONTENTS = {
    "fewer transitions": lambda data: {key: value[1:] for key, value in data.items()},
    "transitions of unlike number": lambda data: {**data, "action": data["action"][1:]},
    "a key less": lambda data: {key: value for key, value in data.items() if key != "action"},
    "another dtype": lambda data: {**data, "action": data["action"].double()},
    "another shape": lambda data: {**data, "action": data["action"].repeat(1, 2)},
    "no tensors": lambda data: {**data, "action": "text"},
    "nothing": lambda data: {},
}


@pytest.mark.parametrize("content", CONTENTS)
def test_a_segment_that_fits_its_hash_but_not_the_buffer_is_passed_over(content, tmp_path):
    series(tmp_path, 10, 20, 30)
    path = newest(tmp_path, "checkpoint")
    manifest = json.loads(path.read_text())
    entry = manifest["replay"][-1]
    memory = io.BytesIO()
    torch.save({"start": 20, "data": CONTENTS[content](torch.load(tmp_path / entry["file"])["data"])}, memory)
    (tmp_path / entry["file"]).write_bytes(memory.getvalue())
    entry |= fingerprint(memory.getvalue())
    seal(path, manifest)
    with pytest.warns(UserWarning, match=r"passed over .* checkpoint_000000030\.json"):
        assert load(tmp_path)[0]["frames"] == 20


def test_each_bit_of_a_manifest_that_means_something_is_seen(tmp_path):
    series(tmp_path, 10, 20)
    path = newest(tmp_path, "checkpoint")
    whole, moments = path.read_bytes(), random.Random(0)
    content = json.loads(whole)
    for bit in moments.sample(range(8 * len(whole)), 400):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        try:
            same = json.loads(damaged) == content  # white space
        except ValueError:
            same = False
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            assert load(tmp_path)[0]["frames"] == (20 if same else 10)
        assert bool(said) != same


@pytest.mark.parametrize("frames", [5, 15, 25])
def test_a_copied_manifest_is_no_checkpoint(frames, tmp_path):
    series(tmp_path, 10, 20)
    shutil.copy(newest(tmp_path, "checkpoint"), tmp_path / f"checkpoint_{frames:09d}.json")
    shutil.copy(newest(tmp_path, "checkpoint"), tmp_path / "checkpoint_best.json")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        checkpointer, (_, buffer) = Checkpointer(tmp_path), load(tmp_path)
        assert checkpointer.load()[0]["frames"] == 20
    named = [f"checkpoint_{frames:09d}.json: it is not what was" in str(each.message) for each in said]
    assert named == [True] * 2 * (frames > 20)
    checkpointer.discard_after(20)
    fill(buffer, 20, 30)
    save(checkpointer, buffer, 30)
    assert names(tmp_path, "checkpoint_*") == [f"checkpoint_0000000{name}.json" for name in (20, 30)] + ["checkpoint_best.json"]


NO_FILES = {
    "a folder": Path.mkdir,
    "a pipe": os.mkfifo,
    "a link to nothing": lambda path: path.symlink_to("nowhere"),
    "a link to itself": lambda path: path.symlink_to(path.name),
    "a device": lambda path: path.symlink_to("/dev/zero"),
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("kind", ["state", "replay", "checkpoint"])
@pytest.mark.parametrize("thing", NO_FILES)
def test_what_is_no_file_is_passed_over_and_saved_around(thing, kind, tmp_path):
    series(tmp_path, 10, 20)
    path = newest(tmp_path, kind)
    path.unlink()
    NO_FILES[thing](path)
    with pytest.warns(UserWarning, match=f"passed over .*{path.name} is no file"):
        state, buffer = load(tmp_path)
    assert state["frames"] == 10
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        checkpointer = Checkpointer(tmp_path)
        checkpointer.load()
    checkpointer.discard_after(10)
    NO_FILES[thing](tmp_path / "checkpoint_000000030.json.tmp") if thing != "a folder" else None
    fill(buffer, 10, 30)
    save(checkpointer, buffer, 30)
    assert_same(buffer, load(tmp_path)[1])


def test_a_buffer_is_saved_in_pieces(tmp_path, monkeypatch):
    """No second copy of it is in memory: neither as transitions nor as bytes."""
    rows, written = torch.rand(1000, 100), []
    piece = 50 * rows[0].nbytes
    monkeypatch.setattr(checkpoint, "PIECE", piece)
    write = checkpoint.replace_file
    monkeypatch.setattr(checkpoint, "replace_file", lambda path, content: written.append(len(content)) or write(path, content))
    buffer = make_buffer(800)
    buffer.extend(TensorDict({"observation": rows}, batch_size=1000))
    get, asked = buffer.storage.get, []
    monkeypatch.setattr(buffer.storage, "get", lambda index: asked.append(len(index)) or get(index))
    Checkpointer(tmp_path).save(1000, {"writer": dict(buffer.writer.state_dict())}, buffer)
    monkeypatch.setattr(buffer.storage, "get", get)
    assert 40 < max(asked) <= 50
    assert max(written) < piece + 5_000
    assert len(names(tmp_path, "replay_*")) == 17
    found = load(tmp_path, 800)[1]
    assert torch.equal(found.storage.get(slice(0, 800))["observation"], get(slice(0, 800))["observation"])


def test_a_full_disk_is_one_line_and_leaves_no_file(tmp_path, monkeypatch):
    checkpointer, buffer = series(tmp_path, 10)
    before = identity(tmp_path)

    def full(number):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    fill(buffer, 10, 20)
    with pytest.raises(WriteError, match=r"replay_\w+\.pt can't be written \(No space left on device\)\.$"):
        save(checkpointer, buffer, 20)
    assert identity(tmp_path) == before
