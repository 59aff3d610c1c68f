"""The hyper-parameters of every row, as Markdown: what the rows of a loss share, and what tells them apart."""

from __future__ import annotations

from dataclasses import asdict

from omnet_torchrl.training.options import ROWS, to_config

# Of each loss: what its rows are, and an environment of theirs.
KINDS = {
    "sac": ("SAC", "Hopper-v4"),
    "td3": ("TD3", "Hopper-v4"),
    "dqn": ("DQN", "MinAtar/breakout"),
    "tasks": ("SAC of several tasks", "HalfCheetah/forward+backward"),
}
LEARNING = ("network", "loss", "optim", "exploration", "topology", "num_envs", "init_random_frames", "utd_ratio")
LEARNING += ("policy_update_delay", "reset_interval", "buffer_size", "precision", "normalize_observations")
# Options that the rows of some losses alone read.
ONLY = dict.fromkeys(("policy_noise", "noise_clip", "value_reduction", "noise"), ("td3",)) | {"loss_function": ("td3", "dqn")}
ONLY |= dict.fromkeys(("target_reduction", "double_dqn", "l1", "epsilon_start", "epsilon_end", "epsilon_frames"), ("dqn",))
ONLY |= dict.fromkeys(("channels", "structure", "fan_in", "structure_run", "freeze_hidden"), ("dqn",))
ONLY |= dict.fromkeys(("target_entropy", "alpha_init"), ("sac", "tasks"))
ONLY |= dict.fromkeys(("actor", "actor_layer_norm"), ("sac", "td3", "tasks"))


def settings() -> str:
    """Every option that a run's numbers depend on, of every row: what the rows of a loss share, and what tells them apart."""
    none = "`-` is none, all subnetworks, or the task's own value (dropout of the paper's table 1, REDQ's target entropy)"
    parts = ["## Hyper-parameters of every row", "", f"As options of the command line. {none}."]
    for loss, (title, env) in KINDS.items():
        rows = {name: _options(name, env) for name, row in ROWS.items() if row.loss == loss}
        first = next(iter(rows.values()))
        shared = [option for option, value in first.items() if all(options[option] == value for options in rows.values())]
        groups = list(dict.fromkeys(option.rpartition(".")[0] for option in first if option not in shared))
        changing = any(options["topology.method"] for options in rows.values())  # masks
        same = [f"`{each}` {_text(first[each])}" for each in shared if changing or not each.startswith("topology.")]
        parts += ["", f"### {title}", "", f"In all rows: {', '.join(same)}.", ""]
        parts += [f"| row | {' | '.join(group or 'run' for group in groups)} |", "|---" * (len(groups) + 1) + "|"]
        for name, options in rows.items():
            cells = dict.fromkeys(groups, "")
            for option in (each for each in options if each not in shared):
                group, _, short = option.rpartition(".")
                if group != "topology" or options["topology.method"]:
                    cells[group] += f"{', ' * bool(cells[group])}{short} {_text(options[option])}"
            parts.append(f"| `{name}` | {' | '.join(cell or '-' for cell in cells.values())} |")
    return "\n".join(parts)


def _options(name: str, env: str) -> dict[str, object]:
    """The options of a row that its loss reads, by their full names."""
    found: dict[str, object] = {}
    for group, value in asdict(to_config({"algorithm": name, "env": env})).items():
        if group in LEARNING:
            options = value.items() if isinstance(value, dict) else ()
            found |= {f"{group}.{option}": each for option, each in options} or {group: value}
    return {each: value for each, value in found.items() if ROWS[name].loss in ONLY.get(each.rpartition(".")[2], KINDS)}


def _text(value: object) -> str:
    return "-" if value is None else f"{value:g}" if isinstance(value, float) else str(value).replace(" ", "")
