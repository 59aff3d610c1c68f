"""The example that plays a policy: started as a user starts it or, where one start has been seen, called."""

import dataclasses
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import run_script
from PIL import Image
from test_policy import ENV, NUM_SUBNETS, OPTIONS, trained

PLAY = Path(__file__).parent.parent / "examples" / "play.py"
ROW = re.compile(r" *(\w+) +(\d+) +(-?[\d.]+) ± ([\d.]+) +([\d.]+)")


@pytest.fixture
def run(tmp_path_factory):
    return trained(tmp_path_factory)


@pytest.fixture
def example(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # MuJoCo writes its warnings into a file where it is
    for name in ("MUJOCO_GL", "USER_MUJOCO_GL"):
        monkeypatch.setenv(name, "")  # which the example sets, and which are put back afterwards
    spec = importlib.util.spec_from_file_location("play", PLAY)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def play(example, capsys):
    """Calls the example; returns the lines that it prints."""

    def call(*arguments):
        example.main([str(argument) for argument in arguments])
        return capsys.readouterr().out.splitlines()

    return call


@pytest.fixture
def start(tmp_path):
    """Starts the example; returns the finished process."""

    def run(*arguments, **variables):
        command, environment = [sys.executable, PLAY, *arguments], {**os.environ, **variables}
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)

    return run


def table(lines):
    """Name to episodes, mean return, its standard deviation, and mean length."""
    rows = [match.groups() for match in map(ROW.fullmatch, lines) if match]
    return {name: tuple(map(float, values)) for name, *values in rows}


def drawn(call):
    """The result of ``call``, or a skip where nothing can be drawn."""
    try:
        return call()
    except ValueError as error:
        if "can't be drawn" not in str(error):
            raise
        pytest.skip(str(error))


def test_a_row_for_each_subnet_and_the_total_where_nothing_can_be_drawn(start, run):
    result = start(run, "--episodes", "2", MUJOCO_GL="bogus")
    assert result.returncode == 0, result.stderr
    title, header, *lines = result.stdout.splitlines()
    assert ENV in title
    assert "(finished)" in title
    assert header.split() == ["subnet", "episodes", "return", "length"]
    rows = table(lines)
    assert list(rows) == [*map(str, range(NUM_SUBNETS)), "total"]
    assert len(set(map(len, [header, *lines]))) == 1  # aligned
    *each, total = rows.values()
    assert [row[0] for row in each] == [2] * NUM_SUBNETS
    assert total[0] == 2 * NUM_SUBNETS
    for column in (1, 3):
        assert total[column] == pytest.approx(sum(row[column] for row in each) / NUM_SUBNETS, abs=0.11)


def test_frames_that_cannot_be_drawn_are_refused_with_advice(start, run, tmp_path):
    result = start(run, "--frames", tmp_path / "frames", MUJOCO_GL="bogus")
    assert result.returncode == 1
    assert result.stdout == ""
    assert result.stderr.startswith(f"error: {ENV} can't be drawn with MUJOCO_GL=bogus (RuntimeError: ")
    assert "MUJOCO_GL=egl" in result.stderr
    assert "apt install libosmesa6" in result.stderr
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "frames").exists()


def test_a_reader_that_goes_away_ends_it_in_silence(run):
    command = [sys.executable, PLAY, run, "--episodes", "1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert ENV in process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 0


def test_an_error_is_one_line(example, tmp_path):
    said = f"error: {tmp_path} is no run folder: expected run.json in it, which is missing.\n"
    assert run_script(tmp_path, script=PLAY) == (1, said)


def test_one_subnet_alone_plays_the_episodes_it_plays_among_all(play, run):
    everything = table(play(run, "--episodes", 2))
    alone = table(play(run, "--episodes", 2, "--subnet", 1))
    assert alone == {"1": everything["1"]}
    assert table(play(run, "--episodes", 2, "--subnet", 1, "--seed", 7)) != alone


def test_observations_are_off_as_the_runs_were(example, play, run, capsys, monkeypatch):
    plain = table(play(run, "--subnet", 0, "--episodes", 2))
    load = example.load_config
    monkeypatch.setattr(example, "load_config", lambda path: dataclasses.replace(load(path), observation_offset=0.5))
    lines = play(run, "--subnet", 0, "--episodes", 2)
    assert lines[0].endswith(", observations off by up to 0.5")
    assert table(lines) != plain
    assert table(play(run, "--subnet", 0, "--episodes", 2)) == table(lines)


def test_a_run_of_the_maze_is_refused(example, run, monkeypatch):
    load = example.load_config
    monkeypatch.setattr(example, "load_config", lambda path: dataclasses.replace(load(path), env="Maze2D"))
    with pytest.raises(ValueError, match=r"Maze2D is no environment of gymnasium.*trajectories\.csv"):
        example.main([str(run)])


OWN = """
from test_foreign_environments import Cart


class Undrawn(Cart):
    def __init__(self, render_mode=None):
        self.render_mode = render_mode


class Nothing(Undrawn):
    def render(self):
        pass


class Broken(Undrawn):
    def render(self):
        return self.picture


def modeless():
    return Cart()
"""


@pytest.mark.parametrize(
    ("what", "draw", "message"),
    [
        ("Undrawn", True, "can't be drawn: NotImplementedError: --video and --frames need a render() that returns an image."),
        ("Nothing", True, 'can\'t be drawn: with render_mode="rgb_array", it returned nothing: --video and --frames need'),
        (
            "Broken",
            True,
            "can't be drawn: AttributeError: 'Broken' object has no attribute 'picture': --video and --frames need",
        ),
        ("modeless", True, "can't be made: TypeError: modeless() got an unexpected keyword argument 'render_mode'."),
        ("Undrwn", False, "can't be made: own_pictures has no class, function or id 'Undrwn'; the closest are Undrawn, "),
    ],
)
def test_what_an_environment_of_ones_own_cannot_do_is_not_blamed_on_opengl(what, draw, message, example, tmp_path, monkeypatch):
    (tmp_path / "own_pictures.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError) as error:
        example.make(f"own_pictures:{what}", draw)
    assert str(error.value).startswith(f"env 'own_pictures:{what}' {message}")
    sys.modules.pop("own_pictures")


@pytest.mark.parametrize("draw", [False, True])
def test_a_module_that_lies_elsewhere_is_said(draw, example, tmp_path):
    with pytest.raises(ValueError, match=f"neither installed nor in {tmp_path}: start in the directory that has it") as error:
        example.make("elsewhere:Env", draw)
    assert "OpenGL" not in str(error.value)


@pytest.mark.filterwarnings("ignore:.*units .* lose every one")
def test_a_game_is_played_and_drawn(play, tmp_path):
    pytest.importorskip("minatar")
    small = [*OPTIONS[1:], "env=MinAtar/breakout", "num_envs=1", "network.channels=2", "eval.episodes=6"]
    script = PLAY.with_name("minatar_dqn.py")
    assert run_script(*small, f"folder={tmp_path / 'game'}", script=script)[0] == 0
    lines = play(tmp_path / "game", "--episodes", 1, "--video", tmp_path / "game.gif")
    lengths = [row[3] for name, row in table(lines).items() if name != "total"]
    with Image.open(tmp_path / "game.gif") as video:
        assert video.n_frames == sum(length + 1 for length in lengths)
        assert (video.size, video.info["duration"]) == ((320, 320), 100)
    again = table(play(tmp_path / "game", "--episodes", 1, "--subnet", 1))
    assert again["1"] == table(lines)["1"]


def test_stochastic_episodes_differ_from_each_other_and_repeat_with_the_seed(play, run):
    arguments = (run, "--subnet", 0, "--stochastic", "--episodes", 2)
    rows = [table(play(*arguments)) for _ in range(2)]
    assert rows[0] == rows[1]
    assert rows[0] != table(play(run, "--subnet", 0, "--episodes", 2))


def test_frames_are_the_states_of_the_first_episode(play, run, tmp_path):
    lines = drawn(lambda: play(run, "--subnet", 1, "--episodes", 1, "--frames", tmp_path / "frames"))
    frames = sorted((tmp_path / "frames").iterdir())
    assert str(tmp_path / "frames") in lines[-1]
    assert frames[0].name == "subnet_1_00000.png"
    assert len(frames) == table(lines)["1"][3] // 5 + 1  # Hopper takes 125 steps a second
    with Image.open(frames[0]) as first, Image.open(frames[-1]) as last:
        assert first.size == (480, 480)
        assert len(first.getcolors(480 * 480)) > 50
        assert first.tobytes() != last.tobytes()


def test_a_gif_shows_every_subnet_in_real_time(play, run, tmp_path):
    lines = drawn(lambda: play(run, "--episodes", 1, "--video", tmp_path / "new" / "hopper.gif"))
    lengths = [row[3] for name, row in table(lines).items() if name != "total"]
    with Image.open(tmp_path / "new" / "hopper.gif") as video:
        assert video.n_frames == sum(length // 5 + 1 for length in lengths)
        assert video.info["duration"] == 40


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--subnet", "3"], r"subnet must be in \[0, num_subnets=3\), got 3"),
        (["--episodes", "0"], "--episodes must be at least 1 .*, got 0"),
        (["--seed", "-1"], r"--seed in \[0, 2\^32\), got 5 and -1"),
        (["--seed", str(2**64)], r"--seed in \[0, 2\^32\), got 5 and 18446744073709551616"),
        (["--video", "hopper.avi"], "must be an .mp4 or a .gif, got hopper.avi"),
    ],
)
def test_a_wrong_option_is_named(play, run, arguments, message):
    with pytest.raises(ValueError, match=message):
        play(run, *arguments)


def test_an_mp4_without_ffmpeg_says_what_to_install(example, run, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r'pip install "imageio\[ffmpeg\]"; or write a .gif'):
        example.main([str(run), "--video", "hopper.mp4"])
