"""Where the batches of updates come from: any replay buffer, or the rows of a storage that the update gathers itself."""

from __future__ import annotations

from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase, is_non_tensor, is_tensor_collection
from torch import Tensor
from torchrl.data import LazyTensorStorage, RandomSampler, ReplayBuffer, SamplerWithoutReplacement


class GatherStorage(LazyTensorStorage):
    """A :class:`~torchrl.data.LazyTensorStorage` for updates that gather their batches from its :attr:`rows`.

    What is read from it and written to it is the same as there, and on a CPU faster: a batch of rows by ``index_select``, which
    copies whole rows, where indexing computes the address of each number (five times as long for the 376 of an observation of
    Humanoid-v4); a single row by its number.

    Args:
        max_size (int): as there.

    Keyword Args:
        **kwargs: as there.

    Examples:
        >>> from tensordict import TensorDict
        >>> from torchrl.data import ReplayBuffer
        >>> buffer = ReplayBuffer(storage=GatherStorage(100), batch_size=4)
        >>> _ = buffer.extend(TensorDict(observation=torch.zeros(10, 17), batch_size=[10]))
        >>> buffer.sample()["observation"].shape, buffer.storage.rows["observation"].shape
        (torch.Size([4, 17]), torch.Size([100, 17]))
    """

    @property
    def rows(self) -> TensorDictBase:
        """``(max_size,)``: what it holds, not a copy; those that were not written yet are anything.

        Raises:
            RuntimeError: nothing was written, and :meth:`allocate` not called.
        """
        if not self.initialized:
            raise RuntimeError("a GatherStorage has no rows before the first is written: write one, or call allocate(row).")
        return self._storage

    def allocate(self, row: TensorDictBase) -> None:
        """Make the tensors for rows like this one now, unless they are there; it is not written."""
        if not self.initialized:
            self._init(row)

    def get(self, index: Any) -> Any:
        """The elements at an index, of any kind that a tensor takes; an int64 vector of rows is the fast one."""
        if not self._is_rows(index):
            return super().get(index)
        size = [*index.shape, *self._storage.batch_size[1:]]
        return self._storage.apply(lambda rows: rows.index_select(0, index), batch_size=size)

    def set(self, cursor: Any, data: Any, *, set_cursor: bool = True) -> None:
        """Write elements at an index, of any kind that a tensor takes; a vector of one row is the fast one."""
        one = isinstance(cursor, Tensor) and cursor.shape == (1,) and cursor.dtype == torch.int64
        if one and cursor.device.type == "cpu" and is_tensor_collection(data):
            cursor, data = int(cursor), data[0]
        super().set(cursor, data, set_cursor=set_cursor)

    def _init(self, data: Any) -> None:
        # Rows are whole in memory whatever the strides of the first one: an image may come with its channels last.
        super()._init(data.contiguous() if is_tensor_collection(data) else data)

    def _is_rows(self, index: Any) -> bool:
        if not self.initialized or not is_tensor_collection(self._storage):
            return False
        if self.device is None or self.device.type != "cpu":
            return False
        if not isinstance(index, Tensor) or index.dtype != torch.int64 or index.ndim != 1 or not index.numel():
            return False
        if index.device.type != "cpu" or any(map(is_non_tensor, self._storage.values(True))):
            return False
        low, high = index.aminmax()
        return low.item() >= 0 and high.item() < self._len_along_dim0


class Batches:
    """What blocks of updates read from a replay buffer.

    Of a :class:`~torchrl.data.ReplayBuffer` whose samples are rows at random, and no more, these are the rows and an index of
    them: no subclass, a :class:`GatherStorage` on the updates' device, a :class:`~torchrl.data.RandomSampler` (the default),
    neither transforms nor ``collate_fn``, ``prefetch`` or ``sample_unit``. Any other buffer samples, as only itself can.

    Args:
        buffer (ReplayBuffer): where transitions are written.
        batch_size (int): B, of one update.
        device (torch.device): of the updates.
    """

    def __init__(self, buffer: ReplayBuffer, batch_size: int, device: torch.device):
        self.buffer, self.batch_size, self.device = buffer, batch_size, device
        self.example: TensorDictBase = TensorDict()  # from the first sample on a batch, whose shapes decide the draws
        self._newest: tuple[TensorDictBase, Tensor | None] | None = None

    @property
    def gathered(self) -> bool:
        """Whether it is the rows that updates read."""
        buffer, storage = self.buffer, self.buffer.storage
        if type(buffer) is not ReplayBuffer or type(buffer.sampler) is not RandomSampler or not self._samples_are_rows:
            return False
        if not isinstance(storage, GatherStorage) or storage.ndim != 1 or storage.device != self.device:
            return False
        return not getattr(buffer, "_prefetch", None) and getattr(buffer, "_sample_unit", None) is None

    @property
    def _samples_are_rows(self) -> bool:
        """Whether a sample has what was written, and nothing else."""
        buffer = self.buffer
        collate = getattr(buffer._collate_fn, "__module__", "").startswith("torchrl.")
        return type(buffer.sampler) in (RandomSampler, SamplerWithoutReplacement) and not len(buffer.transform) and collate

    def like(self, row: TensorDictBase) -> tuple[TensorDictBase, int | None] | None:
        """What :meth:`SACUpdate.prepare` takes, for a buffer of rows like this one; their values don't matter.

        ``None`` where only a sample tells: transforms, samplers and ``collate_fn`` may add what the loss reads.
        """
        if not self._samples_are_rows:
            return None
        if not self.gathered:
            return row.expand(self.batch_size, *row.batch_size).clone(), None
        self.buffer.storage.allocate(row)
        return self.buffer.storage.rows, self.batch_size

    def sample(self, count: int) -> tuple[TensorDictBase, Tensor | None]:
        """Batches ``(count, B)``; or all rows, and an index ``(count, B)`` of them."""
        size, index, gathered = count * self.batch_size, None, self.gathered
        if gathered:
            index = self.buffer.sampler.sample(self.buffer.storage, size)[0].view(count, self.batch_size)
            batches = self.buffer.storage.rows
        else:
            batches = self.buffer.sample(size).to(self.device).reshape(count, self.batch_size)
        if self.example.is_empty():
            self.example = batches[:1].expand(self.batch_size) if gathered else batches[0].clone()
        self._newest = batches, index
        return batches, index

    def newest(self) -> TensorDictBase:
        """The last batch of the newest sample.

        Raises:
            RuntimeError: there is none yet.
        """
        if self._newest is None:
            raise RuntimeError("there is no newest batch before the first sample.")
        batches, index = self._newest
        return batches[-1] if index is None else batches[index[-1]]
