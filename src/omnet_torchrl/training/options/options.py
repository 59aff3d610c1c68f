"""Every option of a run, with its default, unit and meaning.

The dataclasses are structured configs of OmegaConf and Hydra, and the one place of every default: the paper's (section 4.1 of
https://arxiv.org/abs/2310.14009). What their values may be is said in :mod:`~omnet_torchrl.training.options.checks`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class NetworkConfig:
    """The networks of critic and actor."""

    num_subnets: int = 5  # N, subnetworks of the critic and of the actor; with masks=redrawn, how many stand for "all N"
    critic: str = "masked"  # masked: one network under num_subnets masks; separate: num_subnets networks; tasks: shared, heads
    actor: str = "masked"  # masked; dense: one network; sparse: one under a mask, see topology; of tasks: as the critic
    channels: int | None = None  # of a convolution of 3 x 3 before the layers, for MinAtar; None: no convolution
    structure: str | None = None  # of the first layer, for MinAtar: random, spatial, predictive or l1; None: the masks' alone
    fan_in: int | None = None  # inputs that a unit of a random or predictive structure keeps; None: 9 cells, all channels
    structure_run: str | None = None  # folder of the run with loss.l1 that an l1 structure is taken from; None: of none
    freeze_hidden: bool = False  # hidden layers keep their first weights; the output layer is trained
    masks: str = "weight"  # weight: over each by itself; unit: whole hidden units, sliced out; redrawn: anew at each call
    sparsity: Any = 0.5  # S, fraction of weights (units) masked out, in [0, 1): one number, or one per linear (hidden) layer
    num_cells: list[int] = field(default_factory=lambda: [256, 256])  # hidden units of each layer
    actor_layer_norm: bool = True  # Linear, LayerNorm, ReLU instead of Linear, ReLU, in the actor
    critic_layer_norm: bool = True  # the same in the critic
    dropout: float | None = 0.0  # of the critic, before its LayerNorm, in [0, 1); None: the row's for the task (table 1)
    mask_bias: bool = False  # mask the biases as well
    dense_input: bool = False  # leave the input layer unmasked
    dense_output: bool = False  # leave the output layer unmasked


@dataclass
class LossConfig:
    """Equations 4 and 5, over SAC, TD3 or DQN: which one is the row's."""

    num_trained_subnets: int | None = 1  # K, critic subnetworks that an update trains; None: all
    num_target_subnets: int | None = 2  # M, target subnetworks of which the minimum is taken; None: all; tasks: critics of each
    replacement: bool = False  # draw subnetworks with replacement
    gamma: float = 0.99  # discount per frame
    target_entropy: float | None = None  # nats, of the action in [-1, 1]; None: the row's: REDQ's for its tasks, or -dim(A)
    alpha_init: float = 1.0  # temperature at the start
    policy_noise: float = 0.2  # TD3: of the target's action, of one in [-1, 1], clipped at noise_clip
    noise_clip: float = 0.5  # TD3: the largest noise of the target's action
    value_reduction: str = "mean"  # TD3: the actor ascends the mean, the min or the first of its critics
    target_reduction: str = "min"  # DQN: min or mean of the target subnetworks' values; subnet: each trained one's own
    double_dqn: bool = True  # DQN: the trained subnetwork chooses the action of the next state
    loss_function: str = "l2"  # TD3, DQN: of the critic; l2, l1 or smooth_l1
    l1: float = 0.0  # DQN: coefficient of the L1 norm of the hidden layers' weights, which learns a structure


@dataclass
class OptimConfig:
    """Adam, and the target network's step."""

    lr: float = 3e-4  # learning rate of critic, actor and temperature
    batch_size: int = 256  # transitions per update
    lazy: bool = False  # do not move weights that no subnetwork of an update has; plain Adam moves them by momentum
    tau: float = 0.005  # step of the target networks towards the networks, after each update; 1: a copy
    target_update_interval: int = 1  # updates between two steps of the target networks; DQN copies each 1,000


@dataclass
class ExplorationConfig:
    """Of TD3 and DQN, whose policies are deterministic; SAC's actor draws its actions."""

    noise: float = 0.1  # TD3: standard deviation of the noise, of an action in [-1, 1]
    epsilon_start: float = 1.0  # DQN: probability of a random action at the start
    epsilon_end: float = 0.1  # DQN: at the end of epsilon_frames, and from then on
    epsilon_frames: int = 100_000  # DQN: frames in which epsilon falls, linearly


@dataclass
class TopologyConfig:
    """Masks that change between updates, see :class:`~omnet_torchrl.MaskSchedule`; each keeps 1 - network.sparsity."""

    method: str | None = None  # saliency (DAPD), rigl, set or static (random masks); None: masks stay as the network drew them
    layers: str | None = None  # global (one ranking), erk or uniform; None: global with saliency, erk with the others
    interval: int = 1_000  # frames between two changes; the first ones come with the first updates
    warm_up_frames: int = 0  # no freeze rule counts before this frame
    freeze_overlap: float | None = None  # masks stay from the change on whose overlap (Jaccard) reaches it; None: no such rule
    freeze_return: float | None = None  # masks stay from the evaluation on that is above it (DAPD's rule); None: no such rule
    end: int | None = None  # last frame of a change, where RigL's and SET's fraction has fallen to 0; None: no end, no fall
    fraction: float = 0.5  # RigL, SET: share of the weights that is replaced at first
    average_decay: float = 0.0  # saliency: of the moving average of scores; 0: the newest scores alone
    scored_under: str = "dense"  # saliency: the network without masks (DAPD), or under its own masks
    scored_by: str = "critic"  # whose loss scores the critic: the critic's, or both, its own and the actor's
    recent_frames: int | None = 1_000  # a change is scored on a batch of so many newest transitions; None: of all
    grown_weights: str = "kept"  # a weight that comes has the value that it had (kept) or zero
    reset_moments: bool = True  # forget Adam's moments of weights that leave, so that they do not move


@dataclass
class CollectConfig:
    """Who steps the environments; see the guide on slow environments."""

    backend: str = "direct"  # direct: this process; process: others of this machine; ray: those of a Ray cluster
    num_workers: int = 1  # processes of process and ray, each with num_envs environments of its own
    steps: int = 5  # process, ray: of each environment between two weights of the policy; more: less waiting, older weights


@dataclass
class EvalConfig:
    """Deterministic episodes in an environment of their own, which cycle through the subnetworks."""

    interval: int = 5_000  # frames between evaluations
    episodes: int = 10  # episodes per evaluation, each in an environment of its own; 0: no evaluation and no environment for it
    bias_episodes: int = 0  # episodes with random actions per evaluation, for the value bias (figure 4); 0: it is not measured


@dataclass
class CheckpointConfig:
    """What a run can be resumed from."""

    interval: int = 10_000  # frames between checkpoints; 0: only at the end and when the run is stopped
    keep: int = 2  # latest checkpoints that are kept


@dataclass
class WandbConfig:
    """Read with ``logger=wandb`` only. Where an option is None, the environment variables of wandb hold."""

    project: str | None = None  # project that the run appears in; None: WANDB_PROJECT, or omnet_torchrl
    mode: str | None = None  # offline (files in the run's folder), online or disabled; None: WANDB_MODE, or offline
    entity: str | None = None  # user or team; None: WANDB_ENTITY, or the account's own
    group: str | None = None  # runs shown together; None: WANDB_RUN_GROUP, or none


@dataclass
class TrainConfig:
    """One run."""

    algorithm: str = "omnet"  # the row of the results table whose options these are, see rows.py
    env: str = "Hopper-v4"  # a gymnasium id, Maze2D, MinAtar/<game>, or your own: module:Id or module:function; tasks: A+B+C
    env_kwargs: dict[str, Any] = field(default_factory=dict)  # arguments of the environment: env_kwargs.frame_skip=2
    wrappers: list[str] = field(default_factory=list)  # around it, one after the other, each module.Class
    flatten_observation: bool = False  # make one vector of observations that are none
    max_episode_steps: int | None = None  # steps after which an episode is truncated; None: the environment's own number
    normalize_observations: bool = False  # in the networks, by running mean and variance of all that were collected so far
    num_envs: int = 1  # environments stepped together, of each worker: that many frames a step; of T tasks 1, and T frames
    observation_offset: float = 0.0  # scale of the constant noise on the observations of an episode (section 4.4)
    seed: int = 0  # of everything random in the run
    device: str = "auto"  # cpu, cuda or cuda:1; auto: cuda where there is one
    precision: str = "float32"  # of the inputs of matrix products; bfloat16: faster, weights and losses stay float32
    compile: bool = True  # compile update and policy (Inductor; on a GPU the update in a CUDA graph)
    num_threads: int | None = None  # CPU threads of torch; None: torch's own choice
    total_frames: int = 300_000  # environment steps, the random ones included
    init_random_frames: int = 5_000  # uniformly random actions at the start; no update before their end
    utd_ratio: float = 20  # critic updates per frame; a fraction is one update every so many frames
    policy_update_delay: int = 20  # critic updates per actor and temperature update
    reset_interval: int | None = None  # frames after which networks and optimisers start anew; None: never
    buffer_size: int = 1_000_000  # transitions that are kept for replay
    network: NetworkConfig = field(default_factory=NetworkConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    exploration: ExplorationConfig = field(default_factory=ExplorationConfig)
    topology: TopologyConfig = field(default_factory=TopologyConfig)
    collect: CollectConfig = field(default_factory=CollectConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    wandb: WandbConfig = field(default_factory=WandbConfig)
    logger: str = "csv"  # csv, tensorboard or wandb; metrics.csv is written in any case
    log_interval: int = 100  # frames between records of training metrics
    progress: bool = True  # show a progress bar
    stop_when_diverged: bool = True  # end the run at a loss that is not finite; false: where the actor is not; nothing is saved
    folder: str = "runs/${env}/${algorithm}/seed${seed}/${now:%Y-%m-%d_%H-%M-%S}"  # of the run's files
    resume: str | None = None  # folder of the run to go on with; auto: `folder`, if there is a run in it; None: a new run

    @property
    def environments(self) -> int:
        """Environments of one step: those of all workers."""
        return self.num_envs * self.collect.num_workers
