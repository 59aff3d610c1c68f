"""Dropout whose noise is data.

:class:`torch.nn.Dropout` draws from torch's global generator whenever it is called. An update with it depends on more than its
arguments, gives other numbers when it is compiled, and is not repeated by a resumed run. Here the noise is a function of a
seed, a buffer that the caller of the network sets: :class:`~omnet_torchrl.OMNetSACLoss` draws one for each pass. The seed is 0
at first. One seed gives one noise: for others (Monte-Carlo dropout), set ``layer.dropout_seed`` before each call.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from tensordict import TensorDictParams
from torch import Tensor, nn

from omnet_torchrl.layers.indexed import IndexedLayer
from omnet_torchrl.masks import random_bits

SEED = "dropout_seed"  # the buffer's name, by which a loss finds it


class SeededDropout(IndexedLayer, nn.Dropout):
    """Dropout that is a function of (input, seed); see the module's docstring.

    Args:
        p (float): probability of an element to be zeroed, in [0, 1]. Those kept are scaled by 1/(1-p), as in
            :class:`torch.nn.Dropout`.
        stream (int): layers of different streams draw different noise from the same seed.
        device (torch.device or None): of the seed.

    Shape:
        input ``(*shape)``, output ``(*shape)``: every element has noise of its own. An index may follow and is ignored.

    Examples:
        >>> layer, input = SeededDropout(0.5), torch.ones(8)
        >>> torch.equal(layer(input), layer(input))  # the same seed
        True
    """

    dropout_seed: Tensor

    def __init__(self, p: float = 0.5, stream: int = 0, device: torch.device | str | None = None):
        super().__init__(p)
        self.stream = stream
        self.register_buffer(SEED, torch.zeros((), dtype=torch.int64, device=device))

    def forward(self, input: Tensor, subnet: Tensor | None = None) -> Tensor:
        """Zero a part of the elements in training mode; return the input in evaluation mode."""
        if not self.training or self.p == 0:
            return input
        bits = random_bits(self.dropout_seed, input.numel(), self.stream).view(input.shape)
        return input * (bits >= round(self.p * 2**32)) * (1 / (1 - self.p) if self.p < 1 else 0.0)

    def extract(self, subnet: int) -> nn.Dropout:
        """Return a plain :class:`torch.nn.Dropout`."""
        return nn.Dropout(self.p)


def seed_dropout(network: nn.Module) -> None:
    """Put a :class:`SeededDropout` in the place of each :class:`torch.nn.Dropout` of ``network``.

    A layer that is in several places is replaced by one for each place, with noise of its own. Other kinds of dropout stay, and
    a warning says so.
    """
    parameter = next(network.parameters(), None)
    device = None if parameter is None else parameter.device
    found = [
        (parent, name)
        for parent in network.modules()
        for name, child in parent._modules.items()  # named_children() has a shared one once
        if type(child) is nn.Dropout
    ]
    for stream, (parent, name) in enumerate(found):
        old = getattr(parent, name)
        setattr(parent, name, SeededDropout(old.p, stream, device).train(old.training))
    kinds = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
    others = [m for m in network.modules() if isinstance(m, kinds) and not isinstance(m, SeededDropout) and m.p]
    if others:
        names = ", ".join(sorted({type(other).__name__ for other in others}))
        warnings.warn(
            f"{names} draws from torch's global generator: an update is then no function of its draws. Only torch.nn.Dropout "
            "is replaced by SeededDropout.",
            stacklevel=3,
        )


def with_seed(params: Any, seed: Tensor | None) -> Any:
    """Return the parameters of a network, a TensorDict, with this seed in all of its dropout; unchanged for ``None``."""
    keys = () if seed is None else [key for key in params.keys(True, True) if key[-1] == SEED]
    if not keys:
        return params
    params = (params._param_td if isinstance(params, TensorDictParams) else params).copy()
    for key in keys:
        params.set(key, seed)
    return params
