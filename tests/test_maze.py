"""Pictures of the maze: the ways of an actor's subnetworks, what a CSV file gives back, and what is drawn."""

import maze
import pytest
import torch
from matplotlib.image import imread
from torch import nn
from torchrl.envs import Compose, DoubleToFloat, InitTracker, RewardSum, StepCounter, TransformedEnv, check_env_specs

from omnet_torchrl import Maze2DEnv, RedrawnMLP, make_actor
from omnet_torchrl.envs import ENCLOSURE
from omnet_torchrl.metrics import trajectory_diversity
from omnet_torchrl.training.loop.evaluation import evaluate, subnet_trajectories

WAYS = torch.tensor([[[0.5, 0.5], [0.25, 0.5], [0.1, 0.9]], [[0.5, 0.5], [0.5, 0.6], [0.85, 0.8]]])


class Compass(nn.Module):
    """A network of three subnetworks, which go left, up and nowhere."""

    num_subnets = 3

    def __init__(self):
        super().__init__()
        self.ways = nn.Parameter(torch.tensor([[-9.0, 0.0], [0.0, 9.0], [0.0, 0.0]]))

    def forward(self, observation, subnet):
        return torch.cat([self.ways[subnet], torch.zeros(*observation.shape[:-1], 2)], -1)


def actor_of_the_maze(**kwargs):
    env = Maze2DEnv()
    return make_actor(env.observation_spec, env.action_spec, num_cells=(32,), sparsity=[0.0, 0.5], generator=0, **kwargs)


def compass():
    actor = actor_of_the_maze(num_subnets=3)
    actor.module[0].network = Compass()
    return actor


# Ways --------------------------------------------------------------------------------------------------------------------


def test_each_subnetwork_goes_its_own_way():
    ways = subnet_trajectories(compass())
    assert ways.shape == (3, 51, 2)
    assert (ways[:, 0] == 0.5).all()
    torch.testing.assert_close(ways[0, 1], torch.tensor([0.3, 0.5]))
    torch.testing.assert_close(ways[0, -1], torch.tensor([0.002, 0.5]))
    torch.testing.assert_close(ways[1, -1], torch.tensor([0.5, 2 / 3 - 0.002]))
    assert (ways[2] == 0.5).all()


def test_who_is_at_the_goal_stays_there_until_the_others_are_done():
    env = Maze2DEnv(3, walls=(), max_steps=9)
    actor = compass()
    with torch.no_grad():
        actor.module[0].network.ways[1] = torch.tensor([9.0, 9.0])
    ways = subnet_trajectories(actor, env)
    assert ways.shape == (3, 10, 2)
    torch.testing.assert_close(ways[1, 2:], torch.full((8, 2), 0.9))


def test_the_ways_are_those_of_the_extracted_subnetworks():
    actor = actor_of_the_maze(num_subnets=2)
    ways = subnet_trajectories(actor)
    assert torch.equal(subnet_trajectories(actor), ways)
    for k in range(2):
        env, position = Maze2DEnv(), [torch.tensor([0.5, 0.5])]
        plain, state = actor.extract(k), env.reset()
        for _ in range(50):
            distribution = plain.get_dist(state)
            state = env.step(state.set("action", distribution.deterministic_sample))["next"]
            position.append(state["observation"])
            if state["done"]:
                break
        torch.testing.assert_close(ways[k, : len(position)], torch.stack(position))


def test_an_env_of_another_batch_size_raises():
    with pytest.raises(ValueError, match=r"batch size \(3,\), one per subnetwork, got \(2,\)"):
        subnet_trajectories(compass(), Maze2DEnv(2))


def test_of_very_many_subnetworks_the_first_go():
    actor = make_actor(Maze2DEnv().observation_spec, Maze2DEnv().action_spec, num_cells=(4,), network_class=RedrawnMLP)
    assert actor.num_subnets > 1_000
    assert subnet_trajectories(actor).shape[0] == 32


def test_the_maze_takes_the_transforms_and_the_evaluation_of_a_run():
    actor = actor_of_the_maze()
    env = TransformedEnv(Maze2DEnv(10), Compose(DoubleToFloat(), InitTracker(), RewardSum(), StepCounter()))
    check_env_specs(env, seed=0)
    metrics = evaluate(actor, env, seed=0)
    assert metrics["eval/return"] in range(0, 101, 10)
    assert 2 <= metrics["eval/length"] <= 50


# Files -------------------------------------------------------------------------------------------------------------------


def test_trajectories_come_back_from_their_file(tmp_path):
    path = tmp_path / "trajectories.csv"
    for seed, updates in ((1, 500), (0, 4800), (0, 500)):
        maze.write_trajectories(path, seed, updates, WAYS + seed / 100 + updates / 1e5)
    read = maze.read_trajectories(path)
    assert {seed: list(ways) for seed, ways in read.items()} == {0: [500, 4800], 1: [500]}
    torch.testing.assert_close(read[0][4800], WAYS + 0.048)
    assert path.read_text().startswith("seed,updates,subnet,step,x,y\n1,500,0,0,0.515,0.515\n")


def test_visits_come_back_from_their_file(tmp_path):
    path = tmp_path / "visits.csv"
    maze.write_visits(path, "OMNet", 1, WAYS[0])
    maze.write_visits(path, "one, dense", 0, WAYS[1])
    read = maze.read_visits(path)
    assert list(read) == ["OMNet", "one, dense"]
    torch.testing.assert_close(read["one, dense"][0], WAYS[1])


def test_what_was_written_again_after_a_kill_counts_once(tmp_path):
    path = tmp_path / "visits.csv"
    maze.write_visits(path, "OMNet", 0, WAYS[0][:2])
    maze.write_visits(path, "OMNet", 0, WAYS[1])
    torch.testing.assert_close(maze.read_visits(path)["OMNet"][0], WAYS[1])
    path = tmp_path / "trajectories.csv"
    maze.write_trajectories(path, 0, 500, WAYS.repeat(1, 2, 1))
    maze.write_trajectories(path, 0, 500, WAYS)
    torch.testing.assert_close(maze.read_trajectories(path)[0][500], WAYS)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("frames,seconds\n", "must begin with 'actor,seed,step,x,y', got 'frames,seconds'"),
        ("", "must begin with 'actor,seed,step,x,y', got ''"),
        ("actor,seed,step,x,y\nA,0,1,0.5\n", "line 2: expected actor,seed,step,x,y, got 'A,0,1,0.5'"),
        ("actor,seed,step,x,y\nA,0,1,0.5,0.5\nA,0,2,0.5,half\n", "line 3: expected actor,seed,step,x,y, got 'A,0,2,0.5,half'"),
        ("actor,seed,step,x,y\nA,0,1,0.5,0.5\nA,0,3,0.5,0.5\n", r"line 3: expected step 2 of \['A', 0\], got 3"),
        ("actor,seed,step,x,y\nA,0,2,0.5,0.5\n", r"line 2: expected step 1 of \['A', 0\], got 2"),
    ],
)
def test_a_damaged_file_is_named_with_its_line(tmp_path, text, message):
    path = tmp_path / "visits.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        maze.read_visits(path)
    with pytest.raises(ValueError, match=r"visits\.csv"):
        maze.visitation_figure(path, tmp_path / "figure.png")


def test_ways_of_different_lengths_raise(tmp_path):
    path = tmp_path / "trajectories.csv"
    maze.write_trajectories(path, 0, 500, WAYS)
    path.write_text(path.read_text().rsplit("0,500,1,2", 1)[0])
    with pytest.raises(ValueError, match=r"trajectories\.csv has ways of different lengths"):
        maze.read_trajectories(path)


def test_coverage_counts_whole_seeds_only():
    position = torch.tensor([[0.01, 0.01], [0.01, 0.01], [0.99, 0.99]])
    assert maze.coverage_of_visits({0: position, 3: position[:2]}, 3) == {0: pytest.approx(2 / 900)}
    assert maze.coverage_of_visits({0: position, 3: position[:2]}, 2) == {seed: pytest.approx(1 / 900) for seed in (0, 3)}


# Pictures ----------------------------------------------------------------------------------------------------------------


def test_the_map_shows_walls_start_and_goal(tmp_path, figures):
    assert imread(maze.map_figure(tmp_path / "map.png")).std() > 0
    (axes,) = figures[0].axes
    drawn = [[list(point) for point in line.get_xydata()] for line in axes.lines]
    assert drawn[:3] == [[list(point) for point in wall] for wall in ENCLOSURE]
    assert drawn[3] == [[0.5, 0.5]]
    (goal,) = axes.patches
    assert goal.get_center() == pytest.approx((5 / 6, 5 / 6))
    assert goal.get_radius() == 0.1


def test_the_ways_of_all_subnetworks_are_drawn_with_their_diversity(tmp_path, figures):
    path = tmp_path / "trajectories.csv"
    maze.write_trajectories(path, 0, 500, WAYS)
    maze.write_trajectories(path, 0, 30_000, WAYS)
    maze.write_trajectories(path, 1, 500, WAYS)
    assert imread(maze.trajectories_figure(path, tmp_path / "figure.png")).std() > 0
    first, _, third, fourth = figures[0].axes
    assert first.get_title() == f"500 updates: 1 of 2 there,\ndiversity {float(trajectory_diversity(WAYS)):.3f}"
    ways = {line.get_label(): line.get_xydata() for line in first.lines}
    for subnet in range(2):
        torch.testing.assert_close(torch.tensor(ways[f"subnet {subnet}"]).float(), WAYS[subnet])
    assert (first.get_ylabel(), third.get_ylabel()) == ("seed 0", "seed 1")
    assert [text.get_text() for text in fourth.texts] == ["missing"]
    assert [text.get_text() for text in figures[0].legends[0].texts] == ["subnet 0", "subnet 1"]


def test_visit_frequencies_are_drawn_as_means_over_seeds(tmp_path, figures):
    path = tmp_path / "visits.csv"
    for seed, place in enumerate((0.01, 0.99)):
        maze.write_visits(path, "OMNet", seed, torch.full((20, 2), place))
    maze.write_visits(path, "single", 0, torch.full((10, 2), 0.5))
    assert imread(maze.visitation_figure(path, tmp_path / "figure.png", steps=(10, 20), bins=2)).std() > 0
    first, second, third, fourth = figures[0].axes
    for axes in (first, second):
        assert axes.images[0].get_array().tolist() == [[0.5, 0.0], [0.0, 0.5]]
    assert first.get_title() == "10 steps, 2 seeds:\n25.0% of the cells (25.0% to 25.0%)"
    assert third.images[0].get_array().tolist() == [[0.0, 0.0], [0.0, 1.0]]
    assert first.images[0].get_clim() == third.images[0].get_clim()
    assert [text.get_text() for text in fourth.texts] == ["missing"]
    assert (first.get_ylabel(), third.get_ylabel()) == ("OMNet", "single")


def test_a_row_that_a_killed_process_left_unfinished_is_cut_off(tmp_path):
    path, ways = tmp_path / "ways.csv", torch.rand(2, 3, 2)
    maze.write_trajectories(path, 0, 500, ways)
    whole = path.read_bytes()
    path.write_bytes(whole[:-12])
    maze.write_trajectories(path, 0, 500, ways)  # the run went on from before and is evaluated once more
    torch.testing.assert_close(maze.read_trajectories(path)[0][500], ways, atol=1e-5, rtol=0)
