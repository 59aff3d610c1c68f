"""GatherStorage: the rows of a LazyTensorStorage, whatever the index."""

import pytest
import torch
from tensordict import NonTensorStack, TensorDict
from torchrl.data import LazyTensorStorage, ReplayBuffer

from omnet_torchrl import GatherStorage


def rows(count, start=0):
    numbers = torch.arange(start, start + count, dtype=torch.float32)
    following = TensorDict({"done": numbers.bool()[:, None], "image": numbers[:, None, None].expand(count, 2, 3)}, [count])
    return TensorDict({"observation": numbers[:, None] + torch.arange(4) / 10, "next": following}, [count])


def storages(capacity=20, filled=12):
    both = [cls(capacity) for cls in (GatherStorage, LazyTensorStorage)]
    for storage in both:
        ReplayBuffer(storage=storage).extend(rows(filled))
    return both


def assert_same(a, b):
    assert a.batch_size == b.batch_size
    assert sorted(map(str, a.keys(True, True))) == sorted(map(str, b.keys(True, True)))
    assert (a == b).all()


INDICES = [
    torch.tensor([3, 0, 11, 3]),
    torch.tensor([-1, 2]),
    torch.tensor([5], dtype=torch.int32),
    torch.tensor([[1, 2], [3, 4]]),
    torch.tensor(4),
    torch.zeros(0, dtype=torch.int64),
    torch.arange(12) % 2 == 0,
    slice(2, 9, 3),
    range(3),
    [0, 5],
    7,
]


@pytest.mark.parametrize("index", INDICES, ids=str)
def test_it_gives_what_indexing_gives(index):
    ours, theirs = storages()
    assert_same(ours.get(index), theirs.get(index))


def test_rows_are_gathered_not_indexed(monkeypatch):
    ours, theirs = storages()
    expected = theirs.get(INDICES[0])
    monkeypatch.setattr(LazyTensorStorage, "get", lambda *_: pytest.fail("indexed"))
    assert_same(ours.get(INDICES[0]), expected)


@pytest.mark.parametrize("index", [torch.tensor([12]), torch.tensor([0, 19]), torch.tensor([-13])])
def test_a_row_that_was_not_written_is_refused(index):
    ours, _ = storages()
    with pytest.raises(IndexError):
        ours.get(index)


def test_a_full_storage_that_goes_round():
    ours, theirs = storages(capacity=10, filled=10)
    for storage in (ours, theirs):
        buffer = ReplayBuffer(storage=storage)
        buffer.extend(rows(4, start=100))
    assert_same(ours.get(torch.arange(10)), theirs.get(torch.arange(10)))


def test_a_sample_is_the_same_and_the_buffers_own():
    samples = []
    for storage in storages():
        buffer = ReplayBuffer(storage=storage, batch_size=64)
        buffer.set_rng(torch.Generator().manual_seed(0))
        samples.append(buffer.sample())
    assert_same(*samples)
    samples[0].zero_()
    ours = storages()[0]
    ours.get(torch.arange(12)).zero_()
    assert ours.get(torch.tensor([11]))["observation"].any()
    assert samples[0]["observation"].is_contiguous()


@pytest.mark.parametrize(
    "index", [torch.tensor([3]), torch.tensor([-1]), torch.tensor([15]), torch.tensor([4, 3]), slice(2, 4)]
)
def test_it_writes_what_indexing_writes(index):
    both = storages(capacity=20, filled=20)
    count = index.stop - index.start if isinstance(index, slice) else len(index)
    for storage in both:
        storage.set(index, rows(count, start=100))
    assert_same(*(storage.get(slice(0, 20)) for storage in both))
    assert len(both[0]) == len(both[1])
    assert both[0]._last_cursor_index == both[1]._last_cursor_index


def test_a_mask_of_one_element_is_no_number():
    both = storages(capacity=1, filled=1)
    for storage in both:
        storage.set(torch.tensor([True]), rows(1, start=7))
    assert_same(*(storage.get(slice(0, 1)) for storage in both))


CPU = torch.device("cpu")


def filled(storage=GatherStorage, **kwargs):
    buffer = ReplayBuffer(storage=storage(20), **kwargs)
    buffer.extend(rows(12))
    return buffer


def test_frames_written_one_by_one_go_round():
    both = storages(capacity=5, filled=3)
    for storage in both:
        buffer = ReplayBuffer(storage=storage)
        for i in range(8):
            buffer.extend(rows(1, start=50 + i))
    assert_same(*(storage.get(slice(0, 5)) for storage in both))


def test_what_is_no_tensor_stays():
    data = TensorDict({"reward": torch.arange(3.0), "next": TensorDict({"name": NonTensorStack(*"abc")}, [3])}, [3])
    storage = GatherStorage(5)
    ReplayBuffer(storage=storage).extend(data)
    assert list(storage.get(torch.tensor([2, 0]))["next", "name"]) == ["c", "a"]


def test_rows_of_two_dimensions():
    data = TensorDict({"reward": torch.arange(24.0).view(6, 4, 1)}, [6, 4])
    both = [cls(20) for cls in (GatherStorage, LazyTensorStorage)]
    for storage in both:
        storage.set(range(6), data)
    assert_same(*(storage.get(torch.tensor([5, 1])) for storage in both))


def test_a_device_that_the_data_decides():
    storage = GatherStorage(20, device="auto")
    ReplayBuffer(storage=storage).extend(rows(12).to_tensordict().clear_device_())
    assert_same(storage.get(INDICES[0]), storages()[1].get(INDICES[0]))


def test_an_empty_storage_says_so():
    with pytest.raises(RuntimeError, match="non-initialized"):
        GatherStorage(5).get(torch.tensor([0]))


@pytest.mark.gpu
def test_on_a_gpu_it_indexes():
    storage = GatherStorage(20, device="cuda")
    ReplayBuffer(storage=storage).extend(rows(12))
    assert storage.get(INDICES[0]).device.type == "cuda"
