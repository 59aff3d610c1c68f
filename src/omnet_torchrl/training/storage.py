"""A storage whose random rows are gathered row by row."""

from __future__ import annotations

from typing import Any

import torch
from tensordict import TensorDictBase, is_non_tensor, is_tensor_collection
from torch import Tensor
from torchrl.data import LazyTensorStorage


class GatherStorage(LazyTensorStorage):
    """A :class:`~torchrl.data.LazyTensorStorage` that reads a batch of rows with ``index_select`` on a CPU.

    The same rows as indexing gives: which computes the address of each number, where this copies whole rows, and takes five
    times as long for the 376 numbers of an observation of Humanoid-v4.

    Args:
        max_size (int): as there.

    Keyword Args:
        reuse (bool): a batch is written where the one before it was, if that had as many rows. It is then valid until the next
            one is read; the pages of megabytes of new memory cost as much as their contents. Not for buffers that prefetch, and
            without effect on a GPU. Defaults to ``False``.
        **kwargs: as there.

    Examples:
        >>> from tensordict import TensorDict
        >>> from torchrl.data import ReplayBuffer
        >>> buffer = ReplayBuffer(storage=GatherStorage(100), batch_size=4)
        >>> _ = buffer.extend(TensorDict(observation=torch.zeros(10, 17), batch_size=[10]))
        >>> buffer.sample()["observation"].shape
        torch.Size([4, 17])
    """

    def __init__(self, max_size: int, *, reuse: bool = False, **kwargs: Any):
        super().__init__(max_size, **kwargs)
        self.reuse = reuse
        self._batch: TensorDictBase | None = None

    def get(self, index: Any) -> Any:
        """The elements at an index, of any kind that a tensor takes; an int64 vector of rows is the fast one."""
        if not self._is_rows(index):
            return super().get(index)
        size = [*index.shape, *self._storage.batch_size[1:]]
        if self._batch is None or self._batch.batch_size != torch.Size(size):
            batch = self._storage.apply(lambda rows: rows.index_select(0, index), batch_size=size)
            self._batch = batch if self.reuse else None
            return batch.copy()
        for key, rows in self._storage.items(True, True):
            torch.index_select(rows, 0, index, out=self._batch.get(key))
        return self._batch.copy()

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
