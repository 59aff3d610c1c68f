r"""One OMNet update in plain torch: no TensorDict, no TorchRL, no modules.

It is the update's specification (equations 4 and 5, SAC's entropy terms, Adam, Polyak averaging), the floor of the software
(each step compiled whole) and a numeric oracle: from the same weights, batch and draws, ``OMNetSACLoss`` with ``Update``
comes to the same numbers (``tests/test_speed.py``).

A network is a list of layers ``[weight, bias, gain, shift]`` (the last without normalisation) and their masks ``(N, out, in)``,
as numbers: 0 and 1 multiply exactly, and Inductor reads booleans slowly on a CPU.
"""

import math
import types
from collections.abc import Callable

import torch
from torch import Tensor
from torch.func import grad_and_value
from torch.nn import functional as F

Layers = list[list[Tensor]]
BETA1, BETA2, EPS = 0.9, 0.999, 1e-8


def network(layers: Layers, masks: list[Tensor], subnet: Tensor, x: Tensor) -> Tensor:
    """Outputs ``(R, B, out)`` of the subnetworks ``subnet (R,)`` for the inputs ``x (B, in)``."""
    rows = subnet.shape[0]
    x = x.unsqueeze(0).expand(rows, *x.shape)
    for (weight, bias, *norm), mask in zip(layers, masks, strict=True):
        masked = (weight * mask.index_select(0, subnet)).transpose(1, 2)
        # The bias is added apart, where Inductor fuses it with what follows; addmm would first copy it over the whole output.
        product = torch.mm(x[0], masked[0]).unsqueeze(0) if rows == 1 else torch.bmm(x, masked)
        x = product.unsqueeze(0).squeeze(0) + bias
        if norm:
            x = F.relu(F.layer_norm(x, x.shape[-1:], *norm))
    return x


def act(output: Tensor, noise: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Action ``(B, a)`` within ``[-scale, scale]`` of a squashed Gaussian, and its log-probability ``(B,)`` within [-1, 1]."""
    mean, log_std = output.chunk(2, -1)
    log_std = log_std.clamp(-20, 2)
    pre = mean + log_std.exp() * noise
    # Of the Gaussian, and of tanh, log(1 - tanh^2) in its stable form; the action is scored before it is scaled.
    log_prob = -0.5 * noise.square() - log_std - 0.5 * math.log(2 * math.pi)
    log_prob = log_prob - 2 * (math.log(2) - pre - F.softplus(-2 * pre))
    return scale * pre.tanh(), log_prob.sum(-1)


class Adam:
    """Adam over a list of tensors, in place."""

    def __init__(self, params: list[Tensor], lr: float):
        self.params, self.lr, self.step = params, lr, torch.zeros_like(params[0].view(-1)[0])
        self.m, self.v = ([torch.zeros_like(p) for p in params] for _ in range(2))

    def __call__(self, grads: list[Tensor]) -> None:
        """One step."""
        self.step.add_(1)
        rate = self.lr / (1 - BETA1**self.step)
        correction = (1 - BETA2**self.step).sqrt()
        for p, m, v, g in zip(self.params, self.m, self.v, grads, strict=True):
            m.lerp_(g, 1 - BETA1)
            v.mul_(BETA2).addcmul_(g, g, value=1 - BETA2)
            p.sub_(rate * m / (v.sqrt() / correction + EPS))


class Update:
    """State and steps of an update; ``actor`` and ``critic`` are pairs of layers and masks, with N taken from the masks."""

    def __init__(
        self,
        actor: tuple[Layers, list[Tensor]],
        critic: tuple[Layers, list[Tensor]],
        *,
        scale: float = 1.0,
        target_entropy: float = -1.0,
        gamma: float = 0.99,
        tau: float = 0.005,
        lr: float = 3e-4,
        compile: bool = True,
    ):
        (self.actor, self.actor_masks), (self.critic, self.critic_masks) = actor, critic
        self.scale, self.target_entropy, self.gamma, self.tau = scale, target_entropy, gamma, tau
        self.target = [[p.clone() for p in layer] for layer in self.critic]
        self.log_alpha = torch.zeros_like(self.critic[0][1][:1])
        self.critic_adam = Adam(flat(self.critic), lr)
        self.actor_adam = Adam([*flat(self.actor), self.log_alpha], lr)
        if compile:
            self.critic_step, self.actor_step = (_compile(step) for step in (self.critic_step, self.actor_step))

    def critic_step(self, batch: dict[str, Tensor], draws: dict[str, Tensor]) -> Tensor:
        """Equation 4 for the drawn subnetworks; Adam; the target moves. Returns the loss."""
        state_action = torch.cat([batch["observation"], batch["action"]], -1)
        with torch.no_grad():
            output = network(self.actor, self.actor_masks, draws["next_actor"].view(1), batch["next_observation"])[0]
            action, log_prob = act(output, draws["next_noise"], self.scale)
            following = torch.cat([batch["next_observation"], action], -1)
            value = network(self.target, self.critic_masks, draws["target"], following).squeeze(-1).amin(0)
            value = value - self.log_alpha.exp() * log_prob
            target = batch["reward"] + self.gamma * (1 - batch["terminated"]) * value

        def loss(layers: Layers) -> Tensor:
            qvalue = network(layers, self.critic_masks, draws["critic"], state_action).squeeze(-1)
            return (qvalue - target).square().mean(-1).sum()

        grads, value = grad_and_value(loss)(self.critic)
        self.critic_adam(flat(grads))
        for target, online in zip(flat(self.target), flat(self.critic), strict=True):
            target.lerp_(online, self.tau)
        return value

    def actor_step(self, batch: dict[str, Tensor], draws: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Equation 5 for the drawn actor subnetwork, and the temperature; Adam. Returns both losses."""

        def loss(layers: Layers, log_alpha: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
            output = network(layers, self.actor_masks, draws["actor"].view(1), batch["observation"])[0]
            action, log_prob = act(output, draws["noise"], self.scale)
            state_action = torch.cat([batch["observation"], action], -1)
            value = network(self.critic, self.critic_masks, draws["value"], state_action).squeeze(-1).mean(0)
            actor = (log_alpha.detach().exp() * log_prob - value).mean()
            alpha = -(log_alpha * (log_prob.detach() + self.target_entropy)).mean()
            return actor + alpha, (actor, alpha)

        (grads, alpha), (_, losses) = grad_and_value(loss, argnums=(0, 1), has_aux=True)(self.actor, self.log_alpha)
        self.actor_adam([*flat(grads), alpha])
        return losses


def flat(layers: Layers) -> list[Tensor]:
    """All tensors of a network."""
    return [tensor for layer in layers for tensor in layer]


def _compile(step: types.MethodType) -> Callable:
    """Compiled whole and without guards: all it reads but its arguments is fixed, and they have one shape."""
    # Without guards, one code object is one compiled function: each update needs its own.
    own = types.FunctionType(step.__func__.__code__.replace(), step.__func__.__globals__, step.__name__)
    options = {"guard_filter_fn": lambda guards: [False] * len(guards)}
    return torch.compile(types.MethodType(own, step.__self__), fullgraph=True, dynamic=False, options=options)
