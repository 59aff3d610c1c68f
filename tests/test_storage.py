"""GatherStorage: the rows of a LazyTensorStorage, whatever the index."""

import pytest
import torch
from tensordict import NonTensorStack, TensorDict
from torchrl.data import LazyTensorStorage, ReplayBuffer

from omnet_torchrl.training import GatherStorage


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


def test_a_batch_is_written_where_the_one_before_it_was_if_asked():
    storage, expected = GatherStorage(20, reuse=True), storages()[1]
    ReplayBuffer(storage=storage).extend(rows(12))
    first = storage.get(torch.tensor([3, 0, 11]))
    assert_same(first, expected.get(torch.tensor([3, 0, 11])))
    first["extra"] = torch.zeros(3)
    second = storage.get(torch.tensor([1, 1, 2]))
    assert_same(second, expected.get(torch.tensor([1, 1, 2])))
    for key in second.keys(True, True):
        assert first[key].data_ptr() == second[key].data_ptr()
    for index in (torch.tensor([4, 5]), torch.tensor([-1, 2]), slice(0, 3), torch.tensor([6, 7, 8])):
        assert_same(storage.get(index), expected.get(index))


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
