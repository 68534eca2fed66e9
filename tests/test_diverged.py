"""Numbers that go wrong: noticed before they do damage, named, saved so that they come again, and kept to one seed."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import gymnasium as gym
import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import train.loop
from fdkernels.policy import DisplacementPolicy, NotFinite
from train import diverged, play
from train.agents import AGENTS
from train.agents.base import Agent
from train.data.load import load_dataset
from train.data.synthetic import random_dataset
from train.data.transitions import OfflineDataset
from train.environments import resolve
from train.evaluate import run_episodes
from train.health import FirstUnsound, gradient_numbers, inspect, sound, wrong
from train.loop import Run, check_data
from train.outputs import curve
from train.outputs.checkpoint import newest_step, read_checkpoint
from train.outputs.diverged import FILE, Diverged, read_diverged
from train.run import main, parse
from train.settings import RunError

TINY = (  # noqa: SIM905 (reads as typed)
    "--env hopper-medium --actor-hidden 16 16 --critic-hidden 16 --flow-steps 2 --batch-size 32 --flow-warmup 6 "
    "--critic-warmup 4 --steps 20 --log-every 50 --eval-every 10 --eval-episodes 2 --checkpoint-every 5 --preset quick "
    "--device cpu --no-anneal --freeze-flow-after None --freeze-critic-after None --dataset-size 5 --acting sample"
).split()
GROUP = [*TINY, "--num-seeds", "3"]


@pytest.fixture(autouse=True, scope="module")
def _without_pictures() -> Iterator[None]:
    """Curves of single runs take longer than these runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("train.outputs.curve.draw_curve", lambda *args: None)
        yield


# -- what is noticed -------------------------------------------------------------------------------------------------


def test_losses_and_the_squares_of_gradients_must_be_finite() -> None:
    nan, inf = torch.nan, torch.inf
    losses = torch.tensor([1.0, nan, inf, -inf, 1.0, 1.0, 1.0, 3e38])
    norms = torch.tensor([1.0, 1.0, 1.0, 1.0, nan, inf, 2e19, 1e19])
    assert sound(losses, norms).tolist() == [True, *[False] * 6, True]
    assert sound(losses.double(), norms.double())[6], "float64 holds that square"
    assert sound(losses[0], norms[0]).shape == ()


def test_the_first_unsound_update_of_each_agent_is_kept() -> None:
    first = FirstUnsound(3, torch.device("cpu"))
    first.begin(40)
    for healthy in ([True, True, True], [True, False, True], [False, False, True], [True, True, True]):
        first.note(torch.tensor(healthy))
    assert first.read() == [43, 42, 0]
    alone = FirstUnsound(1, torch.device("cpu"))
    alone.note(torch.tensor(False))
    assert alone.read() == [1]


def test_gradients_that_are_only_too_large_to_square_are_told_from_infinite_ones() -> None:
    large = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([1.0, 3e19])}
    assert wrong(gradient_numbers(large)) == {"squares of gradients": ["their sum, the largest in b"]}
    assert wrong(gradient_numbers({**large, "c": torch.tensor([torch.inf])})) == {"gradients": ["c"]}
    assert wrong(gradient_numbers({"a": torch.tensor([1e18])})) == {}


def test_causes_are_named_before_consequences() -> None:
    agent = AGENTS["fidec"](AGENTS["fidec"].hyperparameters(actor_hidden=(8,), critic_hidden=(8,), flow_steps=2), 5, 2)
    optimizer = agent.make_optimizer()
    batch, draws = agent.sample(random_dataset(50, 5, 2), 8, [torch.Generator().manual_seed(0)])
    batch.masks[3] = torch.nan
    optimizer.state[agent.critic.weights[0]]["exp_avg"][0, 0, 0] = torch.inf
    states = optimizer.state_dict()["state"]
    moments = {f"{i}/{name}": tensor for i, state in states.items() for name, tensor in state.items()}
    before = {name: tensor.clone() for name, tensor in agent.state_dict().items()}
    rows = inspect(agent, moments, batch, draws, ("critic", "flow", "actor"))
    found = wrong(rows)
    assert list(found) == ["Adam's moments", "batch", "losses", "gradients"]
    assert found["Adam's moments"] == ["critic.weights.0 exp_avg"]
    assert found["batch"] == ["masks"]
    assert found["losses"] == ["critic_loss", "total_loss"]
    assert all(name.startswith("critic.") for name in found["gradients"])
    (masks,) = (row for row in rows if row.name == "masks")
    assert (masks.size, masks.wrong, masks.largest) == (8, 1, 1.0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in agent.state_dict().items())


# -- runs ------------------------------------------------------------------------------------------------------------


def before_update(monkeypatch: pytest.MonkeyPatch, number: int, spoil: Callable[[Run], None]) -> None:
    """From here on runs call ``spoil`` right before that update."""
    update = Run._update

    def spoilt(run: Run, *args: Any) -> Any:
        if run.step + 1 == number:
            spoil(run)
        return update(run, *args)

    monkeypatch.setattr(Run, "_update", spoilt)


def in_batch(column: str, value: float, seed: int | None = None) -> Callable[[Run], None]:
    """Put ``value`` into the next batch; in a group into that of one seed."""

    def spoil(run: Run) -> None:
        sample = run.learner.sample

        def once(*args: Any) -> Any:
            run.learner.sample = sample  # type: ignore[method-assign]
            batch, draws = sample(*args)
            rows = getattr(batch, column)
            (rows if seed is None else rows[seed])[0] = value
            return batch, draws

        run.learner.sample = once  # type: ignore[method-assign]

    return spoil


def in_parameter(run: Run) -> None:
    run.members[-1].agent.actor[0].weight.data[0, 0] = torch.inf


def too_large_to_square(run: Run) -> None:
    run.learner.critic.scales[0].data.fill_(1e4)
    in_batch("rewards", 1e18)(run)


def in_gradient(run: Run) -> None:
    run.learner.actor[2].weight.register_hook(lambda gradient: torch.full_like(gradient, torch.inf))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "policy.safetensors")


def assert_equal(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


@pytest.fixture(scope="module")
def straight(datasets: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run in which nothing goes wrong."""
    out = tmp_path_factory.mktemp("straight") / "run"
    assert main([*TINY, "--out", str(out)]) == 0
    return out


@pytest.mark.parametrize(
    ("agent", "spoil", "names"),
    [
        (
            "fidec",
            in_batch("rewards", torch.nan),
            "batch: rewards; losses: critic_loss, total_loss; gradients: critic.",
        ),
        ("fql", in_batch("observations", torch.inf), "batch: observations; losses: critic_loss, flow_loss, q_loss,"),
        ("fidec", in_parameter, "parameters: actor.0.weight; losses: "),
        # losses and gradients are finite; Adam could not keep the squares
        ("fql", too_large_to_square, "squares of gradients: their sum, the largest in critic."),
        ("fidec", too_large_to_square, "squares of gradients: their sum, the largest in critic."),
    ],
)
def test_the_update_at_which_numbers_go_wrong_is_not_made_and_can_be_made_again(
    agent: str,
    spoil: Callable[[Run], None],
    names: str,
    datasets: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "run"
    arguments = [*TINY, "--agent", agent, "--out", str(out)]
    with monkeypatch.context() as patch:
        before_update(patch, 18, spoil)
        assert main(arguments) == 3
        error = capsys.readouterr().err
        assert f"error: seed 0 diverged at update 18 ({agent}): not finite are {names}" in error
        assert f"its state: {out / FILE}" in error
        assert newest_step(out / "checkpoints") == 15
        for path in (out / "checkpoints").glob("step-*"):
            assert all(tensor.isfinite().all() for tensor in read_checkpoint(path).part("agent").values())

    saved = read_checkpoint(out / FILE)
    assert saved.step == 18
    assert {"generator", "batch/rewards", "noise/flow_t"} <= saved.tensors.keys()
    assert diverged.main([str(out)]) == 0, "the saved update names the same"
    printed = capsys.readouterr().out
    assert f"not finite now: {names}" in printed
    assert "critic_loss" in printed

    # without the fault it goes on from the checkpoint to where it would have been, and the file is gone
    assert main([*arguments, "--resume"]) == 0
    assert f"diverged   before: seed 0 diverged at update 18 ({agent})" in capsys.readouterr().out
    assert not (out / FILE).exists()
    assert main([*TINY, "--agent", agent, "--out", str(tmp_path / "straight")]) == 0
    assert_equal(weights(out), weights(tmp_path / "straight"))


def test_the_saved_state_is_that_before_the_update(
    straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before_update(monkeypatch, 16, in_batch("rewards", torch.nan))
    assert main([*TINY, "--out", str(tmp_path / "run")]) == 3
    saved = read_checkpoint(tmp_path / "run" / FILE)
    of_run = read_checkpoint(tmp_path / "run" / "checkpoints" / "step-000000015.safetensors")
    for part in ("agent", "adam"):
        assert_equal(saved.part(part), of_run.part(part))


def test_what_cannot_be_made_again_says_so(
    datasets: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The fault is a hook, which no file holds."""
    out = tmp_path / "run"
    before_update(monkeypatch, 18, in_gradient)
    assert main([*TINY, "--out", str(out)]) == 3
    assert "not finite are gradients: actor.2.weight\n" in capsys.readouterr().err
    assert diverged.main([str(out)]) == 1
    assert "not finite now: nothing\nThen it was otherwise" in capsys.readouterr().out


def test_a_run_that_diverges_again_says_so_again_and_overwrite_clears_it(
    datasets: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [*TINY, "--out", str(tmp_path / "run")]
    with monkeypatch.context() as patch:
        before_update(patch, 18, in_batch("rewards", torch.nan))
        assert main(arguments) == 3
        first = capsys.readouterr().err.splitlines()[-2:]
        before = load_file(tmp_path / "run" / FILE)
        assert main([*arguments, "--resume"]) == 3
        assert capsys.readouterr().err.splitlines()[-2:] == first
        again = load_file(tmp_path / "run" / FILE)
        assert before.keys() == again.keys()
        assert all(torch.equal(before[name].nan_to_num(7), again[name].nan_to_num(7)) for name in before)
    assert main([*arguments, "--steps", "5", "--overwrite"]) == 0
    assert not (tmp_path / "run" / FILE).exists()


def test_a_figure_that_is_no_loss_is_named_too(
    datasets: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    metrics = AGENTS["fidec"].metrics
    monkeypatch.setattr(
        AGENTS["fidec"], "metrics", lambda *args: {**metrics(*args), "top_eigenvalue_share": torch.tensor(torch.nan)}
    )
    assert main([*TINY, "--log-every", "3", "--out", str(tmp_path / "run")]) == 3
    error = capsys.readouterr().err
    assert "seed 0 diverged at update 3 (flow warm-up): not finite are metrics: top_eigenvalue_share = nan" in error
    assert diverged.main([str(tmp_path / "run")]) == 0
    assert "The file holds no update" in capsys.readouterr().out


def test_nothing_wrong_is_saved_or_evaluated(
    datasets: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A parameter that the next updates do not use: only `Run.check` sees it."""
    step = Agent.step

    def spoilt(agent: Agent, optimizer: torch.optim.Optimizer, parts: Any, norms: Any = None) -> None:
        step(agent, optimizer, parts, norms)
        if "data_critic" in parts:
            agent.actor[0].weight.data[0, 0] = torch.nan

    monkeypatch.setattr(Agent, "step", spoilt)
    assert main([*TINY, "--out", str(tmp_path / "run")]) == 3
    assert (
        "diverged at update 10 (critic warm-up): not finite are parameters: actor.0.weight" in capsys.readouterr().err
    )
    assert newest_step(tmp_path / "run" / "checkpoints") == 6
    with (tmp_path / "run" / "evaluations.csv").open() as file:
        assert {row["step"] for row in csv.DictReader(file)} == {"6"}


# -- updates as CUDA graphs, which cannot stop -----------------------------------------------------------------------


class Uncaptured:
    """Stands for `CapturedUpdate` where there is no GPU."""

    def __init__(self, update: Callable[..., Any], generators: Sequence[torch.Generator]) -> None:
        self.update = update

    def __call__(self, *args: Any) -> Any:
        return self.update(*args)


@pytest.mark.parametrize("num_seeds", [1, 2])
def test_captured_updates_are_found_at_the_next_log(
    num_seeds: int, datasets: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [*TINY, "--checkpoint-every", "50", "--log-every", "7", "--out", str(tmp_path)]
    arguments += ["--num-seeds", str(num_seeds)]
    with monkeypatch.context() as patch:
        patch.setattr(train.loop, "captures", lambda *args: True)
        patch.setattr(train.loop, "CapturedUpdate", Uncaptured)
        before_update(patch, 18, in_batch("rewards", torch.nan, seed=None if num_seeds == 1 else 1))
        assert main(arguments) == 3
    captured = capsys.readouterr()
    folder = tmp_path if num_seeds == 1 else tmp_path / "fidec-seed1"
    alone = "" if num_seeds == 1 else f" --num-seeds 1 --seed 1 --out {folder}"
    printed = captured.err if num_seeds == 1 else captured.out
    assert f"seed {num_seeds - 1} diverged at update 18 (fidec): not finite are parameters: log_alpha, flow." in printed
    assert f"CUDA graphs do not stop at an update. --resume --capture off{alone} begins again" in printed
    assert newest_step(folder / "checkpoints") == 10
    assert diverged.main([str(folder)]) == 0
    assert "The file holds no update" in capsys.readouterr().out
    if num_seeds == 2:
        assert (tmp_path / "fidec-seed0" / "result.json").exists(), "the other one went on"
    # and as it says, without graphs the update is found and saved
    before_update(monkeypatch, 18, in_batch("rewards", torch.nan))
    options = f"--resume --capture off --num-seeds 1 --seed {num_seeds - 1} --out {folder}".split()
    assert main([*arguments, *options]) == 3
    assert "not finite are batch: rewards" in capsys.readouterr().err
    assert diverged.main([str(folder)]) == 0


# -- several seeds ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def group(datasets: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three seeds of which none diverges."""
    out = tmp_path_factory.mktemp("group")
    assert main([*GROUP, "--out", str(out)]) == 0
    return out


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("spoil", [in_batch("rewards", torch.nan, seed=2), in_parameter])
def test_the_other_seeds_go_on_as_if_nothing_had_happened(
    spoil: Callable[[Run], None],
    group: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    drawn: list[Sequence[Diverged]] = []
    draw = curve.draw_group_curve
    monkeypatch.setattr(curve, "draw_group_curve", lambda *args: (drawn.append(args[-1]), draw(*args))[1])
    with monkeypatch.context() as patch:
        before_update(patch, 18, spoil)
        assert main([*GROUP, "--out", str(tmp_path)]) == 3
    printed = capsys.readouterr()
    message = "seed 2 diverged at update 18 (fidec): not finite are "
    assert message in printed.out, "at once"
    assert printed.err.splitlines()[-1].startswith(f"error: {message}"), "and at the end"
    rows = [line.split() for line in printed.out.splitlines() if line.startswith("seed ")]
    assert ["seed", "2", "diverged", "at", "update", "18"] in rows
    assert [of_seed.seed for of_seed in drawn[-1]] == [2]
    assert [row["step"] for row in drawn[-1][0].evaluations] == [6, 6, 6, 16, 16, 16]

    for seed in (0, 1):
        ours, theirs = tmp_path / f"fidec-seed{seed}", group / f"fidec-seed{seed}"
        assert_equal(weights(ours), weights(theirs))
        assert (ours / "evaluations.csv").read_text() == (theirs / "evaluations.csv").read_text()
        assert_equal(
            *(read_checkpoint(f / "checkpoints" / "step-000000030.safetensors").part("adam") for f in (ours, theirs))
        )
    lost = tmp_path / "fidec-seed2"
    assert files(lost) == (files(group / "fidec-seed2") - {"policy.safetensors", "result.json"}) | {FILE}
    assert newest_step(lost / "checkpoints") == 15
    assert diverged.main([str(lost)]) == 0

    # a resumed group says so, leaves it out, and still shows it
    capsys.readouterr()
    assert main([*GROUP, "--steps", "25", "--out", str(tmp_path), "--resume"]) == 3
    printed = capsys.readouterr()
    assert f"left out   {message}" in printed.out
    assert printed.out.count("step-000000030.safetensors, step 30") == 2
    assert "diverged at update 18" in printed.out.split("behaviour flow", 1)[1]
    assert message in printed.err
    assert [row["step"] for row in drawn[-1][0].evaluations] == [6, 6, 6, 16, 16, 16]
    # and it may go on alone
    assert main([*TINY, "--seed", "2", "--out", str(lost), "--resume"]) == 0
    assert not (lost / FILE).exists()


def test_a_group_of_which_none_is_left_stops(
    datasets: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [*TINY, "--num-seeds", "2", "--out", str(tmp_path)]
    before_update(monkeypatch, 12, in_batch("rewards", torch.nan, seed=0))
    before_update(monkeypatch, 14, in_batch("rewards", torch.nan, seed=1))
    assert main(arguments) == 3
    printed = capsys.readouterr()
    assert "seed 0 diverged at update 12" in printed.out
    assert "seed 1 diverged at update 14" in printed.err
    assert "all seeds diverged: 0, 1" in printed.err
    assert main([*arguments, "--resume"]) == 2
    assert "--resume: all seeds of this group diverged" in capsys.readouterr().err


def test_the_picture_marks_the_seed_that_diverged(tmp_path: Path) -> None:
    config = parse([*GROUP, "--out", str(tmp_path)])

    def rows(last: int) -> list[dict[str, Any]]:
        return [
            {"step": 10 + step, "role": role, "score_mean": level + step / 100}
            for step in range(0, last + 1, 500)
            for role, level in (("policy", 30.0), ("sample", 20.0), ("flow", 10.0))
        ]

    of_seed = Diverged(2, 760, "fidec", {"losses": ["critic_loss"]}, tmp_path, rows(500))
    pictures = [
        plt.imread(curve.draw_group_curve(config, [rows(1000)] * 2, 25.0, "score", lost)) for lost in ((), (of_seed,))
    ]
    plain, marked = (
        np.argwhere(np.abs(picture[..., :3] - matplotlib.colors.to_rgb(curve.RED)).max(-1) < 0.1)
        for picture in pictures
    )
    assert len(plain) == 0
    # at the end of its three lines, in the middle of the picture, besides the one in the legend
    middle = marked[np.abs(marked[:, 1] / pictures[1].shape[1] - 0.5) < 0.1]
    assert len({row // 40 for row in middle[:, 0]}) >= 3
    # one that diverged before it was evaluated is in the legend alone
    early = of_seed._replace(evaluations=[])
    assert curve.draw_group_curve(config, [rows(1000)], 25.0, "score", [early]).exists()


# -- evaluations, simulators and data --------------------------------------------------------------------------------


class Spoilt(gym.Wrapper):
    """From its fifth step on the simulator answers with NaN."""

    what = "reward"
    steps = 0

    def step(self, action: Any) -> Any:
        assert np.isfinite(action).all(), "it was asked to play NaN"
        observation, reward, *rest = self.env.step(action)
        self.steps += 1
        if self.steps >= 5:
            reward = np.nan if self.what == "reward" else reward
            observation = np.full_like(observation, np.nan) if self.what == "observation" else observation
        return observation, reward, *rest


@pytest.mark.parametrize("what", ["reward", "observation"])
def test_what_a_simulator_answers_is_looked_at(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Spoilt, "what", what)
    monkeypatch.setattr(
        "train.evaluate.kept_vector_env",
        lambda env_id, episodes: gym.vector.SyncVectorEnv([lambda: Spoilt(gym.make(env_id))] * episodes),
    )
    with pytest.raises(NotFinite, match=rf"the {what} of Hopper-v5 after 5 steps has nan at \(0,"):
        run_episodes("Hopper-v5", lambda obs: np.zeros((len(obs), 3)), episodes=2, seed=0)


def test_a_policy_without_numbers_is_not_played(
    straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    shutil.copytree(straight, out)
    monkeypatch.setattr(DisplacementPolicy, "act", lambda agent, obs, noise: torch.full_like(noise, torch.nan))
    assert play.main([str(out), "--acting", "sample", "--episodes", "2"]) == 2
    assert "the policy's action has nan at (0, 0)" in capsys.readouterr().err
    assert main([*TINY, "--steps", "25", "--out", str(out), "--resume"]) == 3
    message = "diverged at update 35 (fidec): not finite are evaluation: the policy's action has nan at (0, 0)"
    assert message in capsys.readouterr().err
    assert newest_step(out / "checkpoints") == 30


def test_numbers_too_large_to_be_scaled_are_refused(straight: Path) -> None:
    data = random_dataset(50, 11, 3)
    data.rewards[3] = -1e30
    config = parse(["--env", "hopper-medium", "--preset", "quick"])
    with pytest.raises(RunError, match=r"--scale-rewards: numbers up to 1e\+30 have no standard deviation"):
        check_data(config, data)
    data.rewards[3], data.states[4, 2] = 0.0, 2e18
    with pytest.raises(RunError, match=r"--standardize-observations: numbers up to 2e\+18 have no standard"):
        check_data(config, data)


# -- the file --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def failed(datasets: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that diverged."""
    out = tmp_path_factory.mktemp("failed") / "run"
    with pytest.MonkeyPatch.context() as patch:
        before_update(patch, 18, in_batch("rewards", torch.nan))
        assert main([*TINY, "--out", str(out)]) == 3
    return out


def test_a_file_that_is_none_is_refused(failed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def error(change: Callable[[dict[str, torch.Tensor], dict[str, Any]], None] | None) -> str:
        """What the command says of the file after ``change`` to its tensors and notes, with a checksum that fits."""
        saved = read_checkpoint(failed / FILE)
        tensors, notes = dict(saved.tensors), json.loads(json.dumps(saved.notes))
        if change is not None:
            change(tensors, notes)
        train.outputs.diverged.write_checkpoint(tmp_path / FILE, saved.step, tensors, notes)
        assert diverged.main([str(tmp_path)]) == (0 if change is None else 2)
        return capsys.readouterr().err

    assert diverged.main([str(tmp_path)]) == 2
    assert "is not there: no number of this run went wrong" in capsys.readouterr().err
    assert error(None) == ""
    wide = torch.zeros(10**6, 2)
    for change, message in (
        (lambda t, n: n["hyper"].update(actor_hidden=[30_000, 30_000]), "torch.float32, and (30000"),
        (lambda t, n: n["hyper"].update(num_fisher_samples=10**12), "and (32, 1000000000000, 3)"),
        (lambda t, n: n["hyper"].update(critic_hidden=[1] * 300_000), "critic_hidden has 300,000 items"),
        (lambda t, n: n["hyper"].update(critic_hidden=[1] * 900), "more layers than there are weights"),
        (lambda t, n: n["hyper"].update(alhpa=1), "TypeError"),
        (lambda t, n: n.update(agent="sac"), "KeyError: 'sac'"),
        (lambda t, n: n.update(parts=["critic", "all"]), "KeyError: 'all'"),
        (lambda t, n: t.pop("batch/rewards"), "TypeError"),
        (lambda t, n: t.update({"batch/actions": wide}), "batch/actions is (1000000, 2) torch.float32, and (32, 3)"),
        (lambda t, n: t.pop("adam/3/exp_avg"), "it lacks adam/3/exp_avg"),
        (lambda t, n: t.update({"adam/99/exp_avg": wide}), "it should not have adam/99/exp_avg"),
        (lambda t, n: t.pop("noise/fisher_noise"), "it lacks noise/fisher_noise"),
    ):
        assert message in error(change), message
    path = tmp_path / FILE
    shutil.copy(failed / FILE, path)
    path.write_bytes(path.read_bytes()[:1000])
    assert diverged.main([str(tmp_path)]) == 2
    assert "is damaged" in capsys.readouterr().err
    save_file({"a": torch.zeros(1)}, path)
    assert diverged.main([str(tmp_path)]) == 2
    assert "is damaged" in capsys.readouterr().err


def test_a_damaged_state_does_not_keep_a_run_from_going_on(
    failed: Path, straight: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    shutil.copytree(failed, out)
    (out / FILE).write_bytes((out / FILE).read_bytes()[:1000])
    assert main([*TINY, "--out", str(out), "--resume"]) == 0
    assert f"refused    checkpoint {out / FILE} is damaged" in capsys.readouterr().out
    assert_equal(weights(out), weights(straight))
    assert not (out / FILE).exists()


def test_what_is_read_is_what_was_saved(failed: Path) -> None:
    saved = read_diverged(failed)
    assert (saved.diverged.seed, saved.diverged.update, saved.diverged.stage) == (0, 18, "fidec")
    assert saved.diverged.found["batch"] == ["rewards"]
    assert [row["step"] for row in saved.diverged.evaluations] == [6, 6, 6, 16, 16, 16]
    assert saved.update is not None
    assert saved.update.parts == ("critic", "flow", "actor")


# -- every update of a run ---------------------------------------------------------------------------------------------


def trained(out: Path, flags: Sequence[str], data: OfflineDataset) -> Run:
    """A run without evaluations."""
    config = parse([*TINY, "--out", str(out), *flags])
    run = Run(config, resolve(config.env), data, torch.device("cpu"))
    for member in run.members:
        member.config.folder.mkdir(parents=True)
    run.train()
    return run


@pytest.mark.long("thirty runs of each agent, and thirty of a group")
@pytest.mark.parametrize("agent", [*AGENTS, "group"])
def test_whichever_update_goes_wrong(
    agent: str, datasets: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = load_dataset(resolve("hopper-medium"), size=5)
    monkeypatch.setattr(Run, "evaluate", lambda run: None)
    flags = ["--num-seeds", "3"] if agent == "group" else ["--agent", agent]
    plain = trained(tmp_path / "plain", flags, data)
    for number in range(1, 31):
        out, lost = tmp_path / str(number), number % 3
        with monkeypatch.context() as patch:
            if agent == "group":
                before_update(patch, number, in_batch("actions", torch.nan, seed=lost))
                run = trained(out, flags, data)
                assert [(of_seed.seed, of_seed.update) for of_seed in run.diverged] == [(lost, number)]
                for ours, theirs in zip(run.alive, (plain.members[i] for i in range(3) if i != lost)):
                    assert_equal(ours.agent.state_dict(), theirs.agent.state_dict())
                out = out / f"fidec-seed{lost}"
            else:
                before_update(patch, number, in_batch("actions", torch.nan))
                with pytest.raises(RunError, match=rf"^seed 0 diverged at update {number} .* batch: actions; losses: "):
                    trained(out, flags, data)
        assert newest_step(out / "checkpoints") == max(
            (step for step in (5, 6, 10, 15, 20, 25, 30) if step < number), default=0
        )
        assert diverged.main([str(out)]) == 0, "the saved update names other numbers"
    capsys.readouterr()
