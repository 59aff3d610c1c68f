r"""The 2D maze of the paper, in pure torch.

Section 4.3 and appendix B of "One is More: Diverse Perspectives within a Single Network for Efficient DRL" (2023,
https://arxiv.org/abs/2310.14009): a point in a unit square, a start inside three walls, a sparse reward in the upper right
corner. The text gives everything but the coordinates of the walls (its figure 5a is a picture) and what a wall does to a step
that runs into it; both are ours, and the walls are an argument.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torchrl.data import Binary, Bounded, Composite, Unbounded
from torchrl.envs import EnvBase

START, GOAL = (1 / 2, 1 / 2), (5 / 6, 5 / 6)
GOAL_RADIUS, GOAL_REWARD = 0.1, 100.0
MAX_ACTION = 0.2

Walls = Sequence[Sequence[Sequence[float]]]
# The middle ninth of the square, open to the left: bottom, right, top; x and y of both ends.
ENCLOSURE: Walls = (((1 / 3, 1 / 3), (2 / 3, 1 / 3)), ((2 / 3, 1 / 3), (2 / 3, 2 / 3)), ((2 / 3, 2 / 3), (1 / 3, 2 / 3)))
BORDER: Walls = (((0, 0), (1, 0)), ((1, 0), (1, 1)), ((1, 1), (0, 1)), ((0, 1), (0, 0)))

# Half the thickness of a wall, how far before it a step ends, and the longest way through it that is no collision. Rounding
# errors (1e-7) are small beside the last, and the last is small beside the first: hence no step gets through.
HALF_THICKNESS, GAP, GRAZE = 1e-3, 1e-3, 1e-4


class Maze2DEnv(EnvBase):
    r"""A batch of points, each in a unit square with three walls between the start and the goal.

    A step moves the point by the action, straight, to the end or to the first wall or border on its way: there it stops, 0.001
    in front, and the rest of the step is lost. No step crosses a wall, however long it is. An episode terminates, with a reward
    of 100, where the point is less than 0.1 away from the goal (5/6, 5/6) *after* a step, and is truncated after 50 steps; all
    other rewards are 0. It starts at (1/2, 1/2): nothing is random, and a seed changes nothing.

    Args:
        batch_size (int or sequence of int): so many points, independent of each other. Defaults to ``()``, one.

    Keyword Args:
        walls (sequence or Tensor): ``(W, 2, 2)``, x and y of both ends of each wall, in [0, 1]; without the border. Defaults to
            :data:`ENCLOSURE`, the middle ninth of the square, open to the left.
        max_steps (int): of an episode. Defaults to 50.
        device (torch.device or None): of all tensors. ``None`` (default): torch's default device.
        dtype (torch.dtype): of observation, action and reward. Defaults to ``torch.float32``.

    Keys:
        Reads ``action (*batch_size, 2)``, within [-0.2, 0.2]; what is outside is clipped. Writes ``observation (*batch_size,
        2)``, x and y within [0, 1]; ``reward``, ``done``, ``terminated`` and ``truncated (*batch_size, 1)``.

    Raises:
        ValueError: walls of another shape, outside the square, without length, or on the start; ``max_steps`` below 1; a
            ``dtype`` other than float32 and float64.

    .. note:: The position is the environment's own state, not what the policy was shown: an observation may be changed by a
        transform. ``state_dict()`` holds it, with the number of steps.

    Examples:
        >>> env = Maze2DEnv(1000)
        >>> env.rollout(50, break_when_any_done=False)["next", "reward"].shape
        torch.Size([1000, 50, 1])
    """

    walls: Tensor
    boxes: Tensor
    goal: Tensor
    start: Tensor
    position: Tensor
    steps: Tensor

    def __init__(
        self,
        batch_size: int | Sequence[int] = (),
        *,
        walls: Walls | Tensor = ENCLOSURE,
        max_steps: int = 50,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ):
        if dtype not in (torch.float32, torch.float64):
            raise ValueError(f"dtype must be torch.float32 or torch.float64, got {dtype}: walls are 0.002 thick.")
        if isinstance(max_steps, bool) or not isinstance(max_steps, int) or max_steps < 1:
            raise ValueError(f"max_steps must be an int of at least 1, got {max_steps!r}.")
        shape = torch.Size((batch_size,) if isinstance(batch_size, int) else batch_size)
        super().__init__(device=device, batch_size=shape)
        self.max_steps, self.dtype = max_steps, dtype
        walls = check_walls(walls)
        boxes = _boxes(torch.cat([walls, torch.tensor(BORDER, dtype=walls.dtype)]))
        start = torch.tensor(START, dtype=dtype, device=device)
        self.register_buffer("walls", walls.to(device, dtype), persistent=False)
        self.register_buffer("boxes", boxes.to(device, dtype), persistent=False)
        self.register_buffer("goal", torch.tensor(GOAL, dtype=dtype, device=device), persistent=False)
        self.register_buffer("start", start.expand(*shape, 2).clone(), persistent=False)
        self.register_buffer("position", self.start.clone())
        self.register_buffer("steps", torch.zeros(*shape, 1, dtype=torch.int64, device=device))
        self.observation_spec = Composite(observation=Bounded(0, 1, (*shape, 2), device, dtype), shape=shape, device=device)
        self.action_spec = Bounded(-MAX_ACTION, MAX_ACTION, (*shape, 2), device, dtype)
        self.reward_spec = Unbounded((*shape, 1), device, dtype)
        ends = ("done", "terminated", "truncated")
        done = {name: Binary(shape=(*shape, 1), dtype=torch.bool, device=device) for name in ends}
        self.done_spec = Composite(done, shape=shape, device=device)

    def _reset(self, tensordict: TensorDictBase | None = None, **kwargs: object) -> TensorDictBase:
        reset = None if tensordict is None else tensordict.get("_reset", None)
        if reset is None:
            reset = torch.ones_like(self.steps, dtype=torch.bool)
        reset = reset.reshape(self.steps.shape)
        self.position = torch.where(reset, self.start, self.position)
        self.steps = self.steps.masked_fill(reset, 0)
        return self._observe(self._at_goal())

    def _step(self, tensordict: TensorDictBase) -> TensorDictBase:
        action = tensordict.get("action").to(self.dtype).clamp(-MAX_ACTION, MAX_ACTION)
        playing = tensordict.get("_step", None)
        if playing is not None:  # those of a batch that wait for the others stay where they are
            action = action * playing.reshape(self.steps.shape)
        self.position = self.move(self.position, action)
        self.steps = self.steps + (1 if playing is None else playing.reshape(self.steps.shape))
        terminated = self._at_goal()
        return self._observe(terminated).set("reward", terminated * torch.full_like(self.goal[:1], GOAL_REWARD))

    def _at_goal(self) -> Tensor:
        return (self.position - self.goal).norm(dim=-1, keepdim=True) < GOAL_RADIUS

    def _observe(self, terminated: Tensor) -> TensorDictBase:
        truncated = self.steps >= self.max_steps
        ends = {"done": terminated | truncated, "terminated": terminated, "truncated": truncated}
        return TensorDict({"observation": self.position.clone(), **ends}, batch_size=self.batch_size, device=self.device)

    def _set_seed(self, seed: int | None) -> None:
        pass

    def move(self, position: Tensor, step: Tensor) -> Tensor:
        """Where straight steps end, each cut off in front of the first wall or border on its way.

        The slab method: on its way, a point is within a box while it is so along both of the box's axes, each of which it
        enters and leaves at fractions of the step that are one division away. A wall that is crossed takes at least its
        thickness; to graze a corner for less than GRAZE is no collision, so that a point which rounding put into one gets out.

        Args:
            position (Tensor): ``(*batch, 2)``, within the square and in no wall.
            step (Tensor): ``(*batch, 2)``, of any length; the two broadcast.

        Returns:
            Tensor: ``(*batch, 2)``.
        """
        tiny = torch.finfo(step.dtype).tiny
        centre, axes, half = self.boxes.split((1, 2, 1), 1)
        offset = ((position[..., None, None, :] - centre) * axes).sum(-1)  # (*batch, W, 2), along and across
        speed = (step[..., None, None, :] * axes).sum(-1)
        speed = torch.where(speed.abs() < tiny, tiny, speed)
        half = half.squeeze(1)
        one, other = (-half - offset) / speed, (half - offset) / speed
        enter, leave = one.minimum(other).amax(-1).clamp_min(0), one.maximum(other).amin(-1)
        length = step.norm(dim=-1, keepdim=True).clamp_min(tiny)
        hit = (enter < 1) & ((leave - enter) * length > GRAZE)
        first = torch.where(hit, enter, torch.inf).amin(-1, keepdim=True)
        return position + step * (first - GAP / length).clamp(0, 1)

    def reachable(self, bins: int = 30) -> Tensor:
        """The cells of a grid whose middle can be reached from the start's cell, from middle to middle of neighbours.

        Args:
            bins (int): cells along x and along y. Defaults to 30, as in the paper's figure 6.

        Returns:
            Tensor: boolean, ``(bins, bins)``, a row for each y; see :func:`~omnet_torchrl.metrics.visitation`.
        """
        middles = (torch.arange(bins, device=self.goal.device, dtype=self.dtype) + 0.5) / bins
        cells = torch.cartesian_prod(middles, middles).flip(-1)  # (bins * bins, 2): y changes slowest
        steps = cells.new_tensor([[1, 0], [-1, 0], [0, 1], [0, -1]]) / bins
        ends = self.move(cells, steps[:, None])  # (4, bins * bins, 2)
        free = (ends - cells - steps[:, None]).norm(dim=-1) < HALF_THICKNESS
        x, y = (int(coordinate * bins) for coordinate in START)
        reached = torch.zeros(len(cells), dtype=torch.bool, device=cells.device)
        reached[y * bins + x] = True
        for _ in range(len(cells)):
            # One cell on, in each of the four directions.
            new = [(reached & way).roll(shift) for way, shift in zip(free, (1, -1, bins, -bins), strict=True)]
            following = torch.stack([reached, *new]).any(0)
            if torch.equal(following, reached):
                break
            reached = following
        return reached.view(bins, bins)


def check_walls(walls: Walls | Tensor) -> Tensor:
    """Return walls as a tensor ``(W, 2, 2)`` of float64; raise unless they lie in the square and off the start."""
    walls = torch.as_tensor(walls, dtype=torch.float64, device="cpu")
    if walls.numel() == 0:
        return walls.reshape(0, 2, 2)
    if walls.ndim != 3 or walls.shape[1:] != (2, 2):
        raise ValueError(f"walls must have shape (W, 2, 2), x and y of both ends of each, got {tuple(walls.shape)}.")
    if not ((walls >= 0) & (walls <= 1)).all():
        raise ValueError(f"walls must lie within [0, 1], got {walls.tolist()}.")
    if (walls[:, 0] == walls[:, 1]).all(-1).any():
        raise ValueError(f"the two ends of a wall must differ, got {walls.tolist()}.")
    centre, along, half = _boxes(walls).split((1, 2, 1), 1)
    local = ((torch.tensor(START, dtype=walls.dtype) - centre) * along).sum(-1)
    if (local.abs() < half.squeeze(1) + GAP).all(-1).any():
        raise ValueError(f"no wall may lie on the start {START}, got {walls.tolist()}.")
    return walls


def _boxes(walls: Tensor) -> Tensor:
    """Walls with a thickness, ``(W, 4, 2)``: centre, direction along, direction across, half the length of both."""
    first, second = walls.unbind(1)
    length = (second - first).norm(dim=-1, keepdim=True)
    along = (second - first) / length
    across = torch.stack([-along[:, 1], along[:, 0]], -1)
    half = torch.cat([length / 2, torch.zeros_like(length)], -1) + HALF_THICKNESS
    return torch.stack([(first + second) / 2, along, across, half], 1)
