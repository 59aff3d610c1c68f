"""MinAtar's games as one batched environment of TorchRL.

MinAtar (Young and Tian, 2019, https://arxiv.org/abs/1903.03176) has five Atari-like games on a grid of 10 x 10 cells. The
package ``minatar``, whose licence is the GPL-3.0, is imported where an environment is made and nowhere else.
"""

from __future__ import annotations

import difflib
import importlib
import json
import logging
from collections.abc import Sequence
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torchrl.data import Binary, Categorical, Composite, OneHot, Unbounded
from torchrl.envs import EnvBase

GAMES = ("asterix", "breakout", "freeway", "seaquest", "space_invaders")
# A colour for each channel, RGB; the first is the empty cell's.
COLOURS = (
    *((16, 16, 24), (68, 119, 170), (238, 102, 119), (34, 136, 51), (204, 187, 68), (102, 204, 238)),
    *((170, 51, 119), (187, 187, 187), (221, 170, 51), (0, 153, 136), (255, 255, 255)),
)


class MinAtarEnv(EnvBase):
    """A batch of games of MinAtar, without a wrapper between: its steps cost little more than the games' own.

    An episode terminates where the game ends it; nothing truncates one: append :class:`~torchrl.envs.StepCounter` with
    ``max_steps`` for that. All randomness comes from one generator for each game, which :meth:`set_seed` seeds with as many
    successive numbers, as ``reset(seed=...)`` does; without it, they are seeded from torch's global generator.

    Args:
        game (str): ``"asterix"``, ``"breakout"``, ``"freeway"``, ``"seaquest"`` or ``"space_invaders"``.
        batch_size (int or sequence of int): so many games, independent of each other. Defaults to ``()``, one.

    Keyword Args:
        minimal_actions (bool): only the actions that do something in this game (the package's v1; 3 in Breakout) instead of all
            six (its v0). Defaults to ``True``.
        categorical_action_encoding (bool): actions are numbers instead of one-hot vectors. Defaults to ``False``, as in
            :class:`~torchrl.envs.GymEnv`.
        sticky_action_prob (float): how probably the game repeats the action before instead of the one that it is given, in
            [0, 1]. Defaults to 0.1, the package's. The first action of an episode may repeat the last of the one before.
        difficulty_ramping (bool): some games become harder as they go on. Defaults to ``True``, the package's.
        device (torch.device or None): of all tensors; the games are played on the CPU. Defaults to ``None``, the CPU.

    Keys:
        Reads ``action``: int64 ``(*batch_size)``, or one-hot of int64 ``(*batch_size, A)``. Writes ``observation``, boolean
        ``(*batch_size, 10, 10, C)``: row, column and what is there (C is 4 to 10); ``reward``, float32, ``done`` and
        ``terminated``, ``(*batch_size, 1)``.

    Raises:
        ValueError: a game that is unknown; a probability outside [0, 1].
        ImportError: ``minatar`` is not installed.

    .. note:: ``state_dict()`` holds the games and their generators, as text in a tensor: ``load_state_dict`` goes on exactly.

    Examples:
        >>> env = MinAtarEnv("breakout", 8)  # doctest: +SKIP
        >>> env.rollout(100, break_when_any_done=False)["observation"].shape  # doctest: +SKIP
        torch.Size([8, 100, 10, 10, 4])
    """

    def __init__(
        self,
        game: str,
        batch_size: int | Sequence[int] = (),
        *,
        minimal_actions: bool = True,
        categorical_action_encoding: bool = False,
        sticky_action_prob: float = 0.1,
        difficulty_ramping: bool = True,
        device: torch.device | str | None = None,
    ):
        if game not in GAMES:
            closest = difflib.get_close_matches(str(game), GAMES, 1, cutoff=0)[0]
            raise ValueError(f"game must be one of {', '.join(GAMES)}, got {game!r}; the closest is {closest!r}.")
        if not 0 <= sticky_action_prob <= 1:
            raise ValueError(f"sticky_action_prob must be in [0, 1], got {sticky_action_prob}.")
        shape = torch.Size((batch_size,) if isinstance(batch_size, int) else batch_size)
        super().__init__(device=device, batch_size=shape)
        make = _environment_class()
        self.games = [make(game, sticky_action_prob, difficulty_ramping) for _ in range(shape.numel())]
        first = self.games[0]
        self.actions = first.minimal_action_set() if minimal_actions else list(range(first.num_actions()))
        cells, count = Binary(shape=(*shape, *first.state_shape()), dtype=torch.bool, device=device), len(self.actions)
        self.observation_spec = Composite(observation=cells, shape=shape, device=device)
        categorical = Categorical(count, shape, device, torch.int64)
        self.action_spec = categorical if categorical_action_encoding else OneHot(count, (*shape, count), device, torch.int64)
        self.reward_spec = Unbounded((*shape, 1), device, torch.float32)
        done = {name: Binary(shape=(*shape, 1), dtype=torch.bool, device=device) for name in ("done", "terminated")}
        self.done_spec = Composite(done, shape=shape, device=device)
        self._categorical = categorical_action_encoding
        self._set_seed(int(torch.randint(2**31, (), device="cpu")))

    def _set_seed(self, seed: int | None) -> None:
        if seed is not None:
            for i, game in enumerate(self.games):
                game.seed((seed + i) % 2**32)

    def _reset(self, tensordict: TensorDictBase | None = None, *, seed: int | None = None) -> TensorDictBase:
        self._set_seed(seed)
        reset = None if tensordict is None else tensordict.get("_reset", None)
        each = [True] * len(self.games) if reset is None else reset.reshape(-1).tolist()
        for game, resets in zip(self.games, each, strict=True):
            if resets:
                game.reset()
        return self._observe([game.env.terminal for game in self.games])

    def _step(self, tensordict: TensorDictBase) -> TensorDictBase:
        action = tensordict.get("action")
        chosen = (action if self._categorical else action.argmax(-1)).reshape(-1).tolist()
        playing = tensordict.get("_step", None)  # those of a batch that wait for the others stay as they are
        plays = [True] * len(self.games) if playing is None else playing.reshape(-1).tolist()
        results = [
            game.act(self.actions[a]) if each else (0, game.env.terminal)
            for game, a, each in zip(self.games, chosen, plays, strict=True)
        ]
        reward = torch.tensor([float(r) for r, _ in results]).view(self.reward_spec.shape)
        return self._observe([ended for _, ended in results]).set("reward", reward.to(self.device))

    def _observe(self, ended: Sequence[bool]) -> TensorDict:
        observation = torch.empty(self.observation_spec["observation"].shape, dtype=torch.bool)
        cells = observation.view(len(self.games), *observation.shape[-3:]).numpy()  # takes arrays without a tensor for each
        for i, game in enumerate(self.games):
            cells[i] = game.state()
        done = torch.tensor(ended, dtype=torch.bool).view(self.reward_spec.shape)
        found = {"observation": observation, "done": done, "terminated": done.clone()}
        found = TensorDict(found, batch_size=self.batch_size)
        return found if self.device is None else found.to(self.device)

    def get_extra_state(self) -> Tensor:
        """Return the games and their generators."""
        text = json.dumps([_written(game) for game in self.games])
        return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        """Go on from the games and generators of :meth:`get_extra_state`, of the same game and as many of them."""
        written = json.loads(bytes(state.tolist()))
        if len(written) != len(self.games) or any(w["name"] != g.env_name for w, g in zip(written, self.games, strict=True)):
            kept = f"{len(written)} of {written[0]['name']!r}"
            raise ValueError(f"the state must be of {len(self.games)} games of {self.games[0].env_name!r}, got {kept}.")
        for game, values in zip(self.games, written, strict=True):
            _restore(game, values)

    def render(self, scale: int = 16) -> Tensor:
        """Draw the games, one colour for each channel, those later on top.

        Returns:
            Tensor: uint8, ``(*batch_size, 10 * scale, 10 * scale, 3)``, RGB.
        """
        grid = torch.stack([torch.from_numpy(game.state()) for game in self.games])
        top = (grid * torch.arange(1, grid.shape[-1] + 1)).amax(-1)
        cells = torch.tensor(COLOURS, dtype=torch.uint8)[top]
        cells = cells.repeat_interleave(scale, 1).repeat_interleave(scale, 2)
        return cells.view(*self.batch_size, *cells.shape[1:])


def _environment_class() -> Any:
    root = logging.getLogger()
    handlers = list(root.handlers)
    logging.disable(logging.WARNING)  # the package logs that it can't draw where seaborn is missing; it needn't
    try:
        return importlib.import_module("minatar.environment").Environment
    except ModuleNotFoundError as error:
        raise ImportError(
            "MinAtar's games are in the package minatar, which is not installed: pip install minatar (licence: GPL-3.0)."
        ) from error
    finally:
        logging.disable(logging.NOTSET)
        root.handlers[:] = handlers


def _written(game: Any) -> dict[str, Any]:
    """All that changes in a game, as numbers, strings and lists."""
    kind, keys, *rest = game.random.get_state()
    fields = {
        name: {"array": value.tolist(), "dtype": str(value.dtype)} if hasattr(value, "dtype") and value.ndim else value
        for name, value in vars(game.env).items()
        if name not in ("random", "channels", "action_map")
    }
    generator = [kind, keys.tolist(), *rest]
    written = {"name": game.env_name, "last_action": game.last_action, "generator": generator, "fields": fields}
    return json.loads(json.dumps(written, default=lambda number: number.item()))  # NumPy's numbers


def _restore(game: Any, written: dict[str, Any]) -> None:
    kind, keys, *rest = written["generator"]
    game.random.set_state((kind, keys, *rest))
    game.env.random = game.random
    game.last_action = written["last_action"]
    for name, value in written["fields"].items():
        if isinstance(value, dict):
            value = torch.tensor(value["array"]).numpy().astype(value["dtype"])
        setattr(game.env, name, value)
