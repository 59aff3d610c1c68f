r"""Observations normalised by running statistics, as the first layer of a network.

The statistics are buffers of one module that actor, critic and target share, and the replay buffer keeps raw observations: what
was stored long ago is normalised as what is seen today. A transform of the environment (:class:`~torchrl.envs.VecNormV2`) would
have stored it with the statistics of its time; TorchRL's :class:`~torchrl.modules.RunningValueNorm` does not clip, and its
float32 count stands still at 2^24 single observations.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class RunningNormalization(nn.Module):
    r"""Normalises by mean and variance of all observations so far.

    .. math:: \mathrm{clip}\big((x - \mu) / \sqrt{\sigma^2 + \epsilon},\, -c,\, c\big)

    Only :meth:`update` changes the statistics, neither a forward pass nor an optimiser, a target step or
    :meth:`~omnet_torchrl.Update.reset`. They are live: whatever reads them, compiled or not, reads those of now. ``eps`` and
    ``clip`` are those of Stable-Baselines3's ``VecNormalize`` (https://jmlr.org/papers/v22/20-1364.html). Two sets merge as in
    "Updating Formulae and a Pairwise Algorithm for Computing Sample Variances", Chan et al., 1979.

    Args:
        num_features (int): size of the observation. Further features of the input, a critic's action, are passed on.

    Keyword Args:
        eps (float): added to the variance. Defaults to 1e-8.
        clip (float): largest absolute value of a normalised feature. Defaults to 10.0.
        device (torch.device, str or None): of the statistics.

    Attributes:
        count, mean, var (Tensor): float64 buffers: number of observations ``()``, their mean and variance ``(num_features,)``.
            Before the first update 0, 0 and 1.

    .. note:: A deep copy of a loss has separate statistics in each of its networks. Make one of networks that were copied
        together, ``copy.deepcopy((actor, qvalue))``.

    Shape:
        input ``(*batch, num_features + others)``, output of the same shape and type.

    Examples:
        >>> from torchrl.data import Bounded, Unbounded
        >>> from omnet_torchrl import make_actor, make_qvalue
        >>> normalize, specs = RunningNormalization(17), (Unbounded(17), Bounded(-1, 1, (6,)))
        >>> actor, qvalue = make_actor(*specs, normalize=normalize), make_qvalue(*specs, normalize=normalize)
        >>> normalize.update(torch.randn(100, 17))  # in the loop: normalize.update(data["observation"])
        >>> int(normalize.count)
        100
    """

    count: Tensor
    mean: Tensor
    var: Tensor

    def __init__(self, num_features: int, *, eps: float = 1e-8, clip: float = 10.0, device: torch.device | str | None = None):
        super().__init__()
        for name, value in {"num_features": num_features, "eps": eps, "clip": clip}.items():
            if not value > 0:
                raise ValueError(f"{name} must be above 0, got {value}.")
        self.num_features, self.eps, self.clip = num_features, eps, clip
        self.register_buffer("count", torch.zeros((), dtype=torch.float64, device=device))
        self.register_buffer("mean", torch.zeros(num_features, dtype=torch.float64, device=device))
        self.register_buffer("var", torch.ones(num_features, dtype=torch.float64, device=device))

    def forward(self, input: Tensor) -> Tensor:
        """Normalise the first ``num_features`` of the last dimension."""
        if input.shape[-1] < self.num_features:
            raise ValueError(f"observations must have {self.num_features} features, got shape {tuple(input.shape)}.")
        observation, others = input[..., : self.num_features], input[..., self.num_features :]
        scale = (self.var + self.eps).sqrt()
        output = ((observation - self.mean.to(input.dtype)) / scale.to(input.dtype)).clamp(-self.clip, self.clip)
        return torch.cat([output, others], -1) if others.shape[-1] else output

    @torch.no_grad()
    def update(self, observation: Tensor) -> None:
        """Take observations ``(*batch, num_features)`` into account.

        Raises:
            ValueError: they are of another size, or not finite; the statistics are then as before.
        """
        if observation.shape[-1:] != self.mean.shape:
            raise ValueError(f"observations must have {self.num_features} features, got shape {tuple(observation.shape)}.")
        batch = observation.reshape(-1, self.num_features).to(self.mean)
        number = len(batch)
        if not number:
            return
        count = self.count + number
        delta = batch.mean(0) - self.mean
        mean = self.mean + delta * (number / count)
        between = delta.square() * (self.count * number / count)
        var = (self.var * self.count + batch.var(0, correction=0) * number + between) / count
        finite = mean.isfinite() & var.isfinite()
        if not finite.all():
            wrong = (~finite).nonzero().flatten().tolist()
            raise ValueError(
                f"observations must be finite, got others in the features {wrong}: they are not taken into account."
            )
        for statistic, value in ((self.count, count), (self.mean, mean), (self.var, var)):
            statistic.copy_(value)

    def extra_repr(self) -> str:
        """Say what the module was made with."""
        return f"{self.num_features}, eps={self.eps}, clip={self.clip}"
