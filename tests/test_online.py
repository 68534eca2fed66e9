"""Going online: what the replay holds and draws, how episodes are played, and runs that are interrupted."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from fdkernels.policy import Acting
from tests.waiting import PATIENCE
from train import diverged
from train.agents import AGENTS
from train.agents.base import Agent
from train.data.episode import Episode
from train.data.load import load_dataset
from train.data.replay import Mixture, Replay
from train.data.spec import EnvSpec, NormalizedReturn, Part, Source, Wanted
from train.data.synthetic import random_dataset
from train.data.transitions import ACTION_BOUND, OfflineDataset
from train.environments import ENVIRONMENTS
from train.loop import Run
from train.online import ONLINE_METRICS, Explorer
from train.outputs import curve
from train.outputs.checkpoint import read_checkpoint
from train.run import main, parse
from train.settings import RunError
from train.simulator import Apart

REPOSITORY = Path(__file__).parents[1]
LIMIT, FALL = 6, 4


class Counting(gym.Env):
    """Counts its steps, pays their number, and ends at ``FALL`` if its start is even, else at its time limit."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (4,), np.float64)
    action_space = gym.spaces.Box(-1, 1, (2,), np.float32)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        super().reset(seed=seed)
        self.start, self.count, self.sum = int(self.np_random.integers(1000)), 0, np.zeros(2)
        return self._observation(), {}

    def step(self, action: np.ndarray) -> Any:
        self.count += 1
        self.sum += action
        fallen = self.count == FALL and self.start % 2 == 0
        return self._observation(), float(self.count), fallen, False, {"success": fallen}

    def _observation(self) -> np.ndarray:
        return np.array([self.start / 1000, self.count, *self.sum])


@dataclasses.dataclass(frozen=True)
class Recorded(Source):
    """Twenty episodes of noise."""

    def is_cached(self, wanted: Wanted) -> bool:
        return True

    def load(self, spec: EnvSpec, wanted: Wanted) -> Sequence[Part]:
        rng = np.random.default_rng(3)
        episodes = [
            Episode(
                rng.standard_normal((steps + 1, 4)) * 3 + 1,
                rng.uniform(-1, 1, (steps, 2)),
                rng.uniform(0, 9, steps),
                np.ones(steps, bool),
            )
            for steps in rng.integers(3, 9, 20)
        ]
        return [Part("counting-v0", "made up", episodes)]


SPEC = EnvSpec("counting", "tests/Counting-v0", (Recorded(),), NormalizedReturn(0.0, 100.0))


def register() -> None:
    """Make the environment known, also in a process of its own."""
    if SPEC.env_id not in gym.registry:
        gym.register(SPEC.env_id, Counting, max_episode_steps=LIMIT)
    ENVIRONMENTS[SPEC.name] = SPEC


@pytest.fixture(scope="module", autouse=True)
def _counting() -> Iterator[None]:
    register()
    yield
    del ENVIRONMENTS[SPEC.name]


def rows_of(count: int, base: float = 0.0) -> list[tuple[Tensor, Tensor, float, Tensor]]:
    """Transitions of one episode whose numbers tell where they belong: action, reward, mask, next state."""
    return [
        (torch.full((3,), base + i), torch.tensor(base + i + 0.5), float(i < count - 1), torch.full((5,), base + i + 1))
        for i in range(count)
    ]


def filled(lengths: Sequence[int], capacity: int = 50, mixture: Mixture = "all", n_step: int = 1) -> Replay:
    """A replay of random data and of episodes of these lengths; episode k counts from 100·k."""
    replay = Replay(random_dataset(40, 5, 3), capacity, mixture, n_step, discount=0.5)
    for k, length in enumerate(lengths, start=1):
        replay.begin(torch.full((5,), 100.0 * k))
        for row in rows_of(length, 100.0 * k):
            replay.add(*row)
    return replay


# -- the replay --------------------------------------------------------------------------------------------------------


def test_transitions_come_back_as_they_were_added() -> None:
    replay = filled([3, 1, 2])
    assert len(replay) == 46
    batch = replay.take(torch.arange(40, 46))
    starts = torch.tensor([100.0, 101, 102, 200, 300, 301])
    assert torch.equal(batch.observations, starts[:, None].expand(-1, 5))
    assert torch.equal(batch.next_observations, starts[:, None].expand(-1, 5) + 1)
    assert torch.equal(batch.actions, starts[:, None].expand(-1, 3))
    assert torch.equal(batch.rewards, starts + 0.5)
    assert batch.masks.tolist() == [1, 1, 0, 0, 1, 0]
    following = torch.tensor([101.0, 102, 102, 200, 301, 301])
    assert torch.equal(batch.next_actions[:, 0], following), "the last action of an episode stands in for the next one"


def test_every_state_is_stored_once_and_nothing_is_copied() -> None:
    replay = filled([3, 1, 2], capacity=6)
    assert replay.tensors()["states"][:, 0].tolist() == [100, 101, 102, 103, 200, 201, 300, 301, 302]
    offline = random_dataset(40, 5, 3)
    replay = Replay(offline, 100)
    places = [getattr(replay.online, name).data_ptr() for name in ("states", "actions", "rewards")]
    for k in range(100):  # episodes of one transition have the most states
        replay.begin(torch.full((5,), float(k)))
        replay.add(*rows_of(1, k)[0])
    assert [getattr(replay.online, name).data_ptr() for name in ("states", "actions", "rewards")] == places
    assert replay.offline is offline
    assert replay.take(torch.tensor([139])).observations[0, 0] == 99


@pytest.mark.parametrize("shape", [(64,), (3, 16)], ids=["one agent", "several"])
def test_old_and_new_in_one_batch(shape: tuple[int, ...]) -> None:
    replay = filled([4])
    index = torch.randint(44, shape)
    batch, offline = replay.take(index), replay.offline.take(index.clamp(max=39))
    for name, column in batch._asdict().items():
        assert column.shape[: len(shape)] == shape
        assert torch.equal(column[index < 40], getattr(offline, name)[index < 40]), name
    assert torch.equal(batch.actions[index >= 40][:, 0], index[index >= 40] - 40 + 100.0)


def poisoned(replay: Replay) -> Replay:
    """Where nothing was added there is NaN, and row numbers that no table has."""
    tables, states = replay.online, len(replay.tensors()["states"])
    tables.states[states:] = torch.nan
    for name in ("actions", "rewards", "masks"):
        getattr(tables, name)[replay.added :] = torch.nan
    for name in ("rows", "next_rows", "next_steps"):
        getattr(tables, name)[max(replay.added, 1) :] = 10**9
    return replay


@pytest.mark.parametrize("mixture", ["all", "balanced"])
@pytest.mark.parametrize("lengths", [[], [1], [5, 2]])
def test_unfilled_rows_are_never_drawn(lengths: list[int], mixture: Mixture) -> None:
    replay = poisoned(filled(lengths, mixture=mixture))
    for _ in range(50):
        for column in replay.sample(256):
            assert torch.isfinite(column).all()
    with pytest.raises(IndexError):  # a test that can fail: the poison works
        replay.take(torch.tensor([len(replay) + 1]))


def assert_uniform(drawn: Tensor, values: int) -> None:
    """Each of 0 ... values − 1 comes up as often as the others, within five standard deviations."""
    counts = torch.bincount(drawn, minlength=values).double()
    assert len(counts) == values
    mean = len(drawn) / values
    assert (counts - mean).abs().max() < 5 * mean**0.5


def test_all_draws_every_transition_equally_often() -> None:
    replay = filled([5, 2])
    assert_uniform(replay.draw(200_000, torch.Generator().manual_seed(1)), 47)
    replay.begin(torch.zeros(5))
    for row in rows_of(3):
        replay.add(*row)
    assert_uniform(replay.draw(200_000, torch.Generator().manual_seed(2)), 50)


def test_balanced_draws_half_of_each() -> None:
    replay = filled([5, 2], mixture="balanced")
    generator = torch.Generator().manual_seed(1)
    drawn = torch.stack([replay.draw(1000, generator) for _ in range(100)])
    assert ((drawn < 40).sum(1) == 500).all()
    assert_uniform(drawn[drawn < 40], 40)
    assert_uniform(drawn[drawn >= 40] - 40, 7)
    assert (filled([], mixture="balanced").draw(1000, generator) < 40).all()


def test_large_replays_are_drawn_from_uniformly() -> None:
    # float32 has 2^24 numbers below one: of these indices every third would never come up
    drawn = Replay._below(torch.tensor(3 * 2**23), 30_000, torch.Generator().manual_seed(1))
    assert_uniform(drawn % 3, 3)


@pytest.mark.parametrize("mixture", ["all", "balanced"])
def test_a_recorded_draw_sees_the_replay_grow(mixture: Mixture) -> None:
    """As with a CUDA graph, the operations are recorded with the tensors that they read, and no Python runs later."""
    replay = filled([2], mixture=mixture)
    recorded = make_fx(lambda: replay.sample(2000))()
    assert recorded()[1][:, 0].max() == 101
    replay.begin(torch.full((5,), 500.0))
    for row in rows_of(3, 500.0):
        replay.add(*row)
    actions = recorded()[1][:, 0]
    assert set(actions[actions >= 100].tolist()) == {100.0, 101, 500, 501, 502}


@pytest.mark.parametrize("n_step", [1, 2, 3, 7, 10**12])
def test_returns_of_several_steps_are_those_of_offline_data(n_step: int) -> None:
    """After every step, the one that has just been made included."""
    rng = np.random.default_rng(2)
    replay, played = Replay(random_dataset(40, 5, 3), 50, "all", n_step, discount=0.7), []
    for steps in (5, 1, 9, 3):
        states, actions = rng.standard_normal((steps + 1, 5)), rng.uniform(-1, 1, (steps, 3))
        rewards = rng.random(steps)
        masks = np.array([True] * (steps - 1) + [steps == 9])
        replay.begin(torch.from_numpy(states[0]))
        for i in range(steps):
            reward = torch.tensor(rewards[i], dtype=torch.float32)
            replay.add(torch.from_numpy(actions[i]), reward, float(masks[i]), torch.from_numpy(states[i + 1]))
            poisoned(replay)
            until = slice(None, i + 1)
            seen = Episode(states[: i + 2], actions[until], rewards[until], masks[until])
            expected = OfflineDataset.from_episodes([*played, seen]).n_step(n_step, 0.7)
            ours, theirs = replay.online.take(torch.arange(len(expected))), expected.take(torch.arange(len(expected)))
            for name, column in ours._asdict().items():
                torch.testing.assert_close(column, getattr(theirs, name), msg=f"{name} after {len(expected)} steps")
        played.append(seen)


@pytest.mark.parametrize("n_step", [1, 4])
def test_a_replay_goes_on_from_its_tensors(n_step: int) -> None:
    straight, (*before, last, end) = filled([3, 2], n_step=n_step), rows_of(5, 700.0)
    straight.begin(torch.full((5,), 700.0))
    for row in before:
        straight.add(*row)
    resumed = Replay(random_dataset(40, 5, 3), 60, "all", n_step, discount=0.5)
    resumed.restore({name: tensor.clone() for name, tensor in straight.tensors().items()})
    for replay in (straight, resumed):
        for row in (last, end):  # the episode goes on
            replay.add(*row)
    for ours, theirs in zip(resumed.take(torch.arange(50)), straight.take(torch.arange(50))):
        assert torch.equal(ours, theirs)
    assert torch.equal(*(replay.draw(100, torch.Generator().manual_seed(1)) for replay in (resumed, straight)))


# -- playing -----------------------------------------------------------------------------------------------------------

ONE_SAMPLE = Acting("sample")
MEAN, STD = torch.tensor([0.1, 2.0, -0.3, 0.4]), torch.tensor([0.7, 3.0, 0.9, 1.1])


def explorer(steps: int, seed: int = 0, capacity: int = 200, acting: Acting = ONE_SAMPLE) -> Explorer:
    """An explorer that has made that many steps."""
    torch.manual_seed(0)
    agent: Agent = AGENTS["fidec"](AGENTS["fidec"].hyperparameters(actor_hidden=(8,), critic_hidden=(8,)), 4, 2)
    agent.obs_mean.copy_(MEAN)
    agent.obs_std.copy_(STD)
    replay = Replay(random_dataset(40, 4, 2), capacity)
    generator = torch.Generator().manual_seed(seed)
    made = Explorer(SPEC.env_id, agent, acting, generator, replay, torch.tensor(1.7), seed)
    for _ in range(steps):
        made.step()
    return made


def test_what_is_played_is_what_the_replay_holds() -> None:
    replay = explorer(60).replay
    batch = replay.take(torch.arange(40, 100))
    raw, raw_next = batch.observations * STD + MEAN, batch.next_observations * STD + MEAN
    at, lengths = 0, []
    while at < 60:
        even = round(raw[at, 0].item() * 1000) % 2 == 0
        lengths.append(FALL if even else LIMIT)
        steps = slice(at, at + lengths[-1])
        count = torch.arange(lengths[-1])[: 60 - at]
        assert torch.allclose(raw[steps, 1], count.float(), atol=1e-5)
        assert torch.allclose(raw_next[steps, 1], count + 1.0, atol=1e-5)
        assert torch.allclose(raw_next[steps, 2:], batch.actions[steps].cumsum(0), atol=1e-5)
        assert torch.equal(batch.rewards[steps], (count + 1.0) / torch.tensor(1.7))
        assert torch.equal(batch.masks[steps], (count != FALL - 1).float() if even else torch.ones(len(count)))
        at += lengths[-1]
    assert set(lengths) == {FALL, LIMIT}, "not both a termination and a time limit"
    assert len(replay.tensors()["states"]) == 60 + len(lengths)


def test_states_are_standardised_to_the_last_bit_like_offline_data() -> None:
    made = explorer(30)
    env = Counting()
    (seed,) = np.random.SeedSequence((0, 1)).generate_state(1)
    observations = [env.reset(seed=int(seed))[0]]
    steps = FALL if env.start % 2 == 0 else LIMIT
    observations += [env.step(action)[0] for action in made.replay.online.actions[:steps].numpy()]
    episode = Episode(np.stack(observations), np.zeros((steps, 2)), np.zeros(steps), np.ones(steps, bool))
    states = (OfflineDataset.from_episodes([episode]).states - MEAN).div_(STD)  # as Run does it
    assert torch.equal(made.replay.tensors()["states"][: steps + 1], states)


def test_actions_are_fresh_samples_of_the_policy_within_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    made = explorer(1)
    noise = torch.randn(1, 2, generator=torch.Generator().manual_seed(0))
    agent, tables = made.agent, made.replay.online
    assert torch.equal(tables.actions[:1], agent.act(tables.states[:1], noise).clamp(-ACTION_BOUND, ACTION_BOUND))
    monkeypatch.setattr(agent, "act", lambda obs, noise: torch.tensor([[1.0, -1.0]]))
    made.step()
    assert tables.actions[1].tolist() == torch.tensor([ACTION_BOUND, -ACTION_BOUND]).tolist()


def test_it_acts_by_the_rule_that_it_is_given() -> None:
    rule = Acting("mean-flow-of-n", 5, 0.1)
    made = explorer(2, acting=rule)
    generator, tables = torch.Generator().manual_seed(0), made.replay.online
    for i in range(2):
        expected = rule(made.agent, tables.states[i : i + 1], rule.draw(made.agent, 1, generator))
        assert torch.equal(tables.actions[i : i + 1], expected.clamp(-ACTION_BOUND, ACTION_BOUND))


def test_reports_are_of_the_episodes_since_the_last_one() -> None:
    made = explorer(0)
    returns = {FALL: sum(range(1, FALL + 1)), LIMIT: sum(range(1, LIMIT + 1))}
    seen: list[int] = []
    for _ in range(2):
        ended: list[int] = []
        while len(ended) < 5:
            made.step()
            if made.steps == 0:
                ended.append(FALL if made.replay.online.masks[made.replay.added - 1] == 0 else LIMIT)
        mean = np.mean([returns[length] for length in ended])
        assert made.report() == {"online_return": mean, "online_success": np.mean([n == FALL for n in ended])}
        assert made.report() == {}
        seen += ended
    assert set(seen) == {FALL, LIMIT}


def test_episodes_begin_from_seeds_of_run_and_number(monkeypatch: pytest.MonkeyPatch) -> None:
    seeds: dict[int, list[int]] = {}
    for run in (0, 1):
        made, asked = explorer(0, run), seeds.setdefault(run, [])
        reset = made.env.reset

        def noted(*, seed: int, reset: Any = reset, asked: list[int] = asked) -> Any:
            asked.append(seed)
            return reset(seed=seed)

        monkeypatch.setattr(made.env, "reset", noted)
        for _ in range(40):
            made.step()
    assert len(set(seeds[0] + seeds[1])) == len(seeds[0] + seeds[1]) > 10


@pytest.mark.parametrize("steps", [1, 3, 10, 17, 23])
def test_an_episode_goes_on_where_it_was_left(steps: int) -> None:
    straight = explorer(steps)
    notes = json.loads(json.dumps(straight.notes()))
    resumed = explorer(0)
    assert resumed.restore({n: t.clone() for n, t in straight.replay.tensors().items()}, notes) is None
    resumed.generator.set_state(straight.generator.get_state())
    for _ in range(20):
        straight.step()
        resumed.step()
    for name, tensor in straight.replay.tensors().items():
        assert torch.equal(resumed.replay.tensors()[name], tensor), name
    assert resumed.report() == straight.report()


class Forgetful(Counting):
    """Starts anywhere, whatever its seed."""

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        return super().reset(seed=None)


def test_an_episode_that_cannot_be_played_again_is_over() -> None:
    straight, resumed = explorer(2), explorer(0)
    assert straight.steps == 2
    resumed.env = Apart(Forgetful())
    line = resumed.restore(straight.replay.tensors(), json.loads(json.dumps(straight.notes())))
    assert line is not None
    assert "episode 1 went another way" in line
    resumed.step()
    assert (resumed.episodes, resumed.steps) == (2, 1)
    batch = resumed.replay.take(torch.tensor([41, 42]))
    assert batch.masks.tolist() == [1, 1]
    assert (batch.observations[1] * STD + MEAN)[1] == pytest.approx(0, abs=1e-6), "the new one does not begin at 0"


class Teleporting(Counting):
    """Draws from NumPy's global generator, as OGBench's mazes do."""

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        np.random.seed(seed)  # noqa: NPY002
        return super().reset(seed=seed)

    def step(self, action: np.ndarray) -> Any:
        self.sum += np.random.standard_normal(2)  # noqa: NPY002
        return super().step(action)


def test_others_that_draw_in_between_change_no_episode() -> None:
    def played(disturbed: bool) -> np.ndarray:
        env = Apart(Teleporting())
        states = [env.reset(seed=5)[0]]
        for _ in range(3):
            if disturbed:
                np.random.seed(1)  # noqa: NPY002
            states.append(env.step(np.zeros(2))[0])
        return np.stack(states)

    np.testing.assert_array_equal(played(True), played(False))
    assert len(np.unique(played(True)[:, 2])) == 4, "nothing was drawn"


# -- runs --------------------------------------------------------------------------------------------------------------

TINY = (  # noqa: SIM905 (reads as typed)
    "--env counting --preset quick --device cpu --actor-hidden 8 8 --critic-hidden 8 --flow-steps 2 --batch-size 8 "
    "--flow-warmup 4 --critic-warmup 4 --critic-warmup-n-step 2 --n-step 3 --steps 8 --log-every 5 --eval-every 1000 "
    "--eval-episodes 3 --interim-episodes 2 --checkpoint-every 9 --freeze-flow-after None"
).split()
OFFLINE, ONLINE = 16, 24


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Most tests need no pictures, which take longer than a run."""
    monkeypatch.setattr("train.outputs.curve.draw_curve", lambda *args: None)


def go(out: Path, *flags: str, online: int = ONLINE) -> Path:
    assert main([*TINY, "--online-steps", str(online), "--out", str(out), *flags]) == 0
    return out


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return [{k: v for k, v in row.items() if k != "updates_per_second"} for row in csv.DictReader(file)]


def assert_same_run(ours: Path, theirs: Path) -> None:
    weights, expected = (load_file(out / "policy.safetensors") for out in (ours, theirs))
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    assert read(ours / "metrics.csv") == read(theirs / "metrics.csv")
    assert read(ours / "evaluations.csv") == read(theirs / "evaluations.csv")


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run."""
    register()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("train.outputs.curve.draw_curve", lambda *args: None)
        return go(tmp_path_factory.mktemp("straight") / "run")


def test_what_an_online_run_leaves_behind(straight: Path) -> None:
    metrics = read(straight / "metrics.csv")
    online = [row for row in metrics if row["stage"] == "online"]
    assert [row["step"] for row in online] == ["21", "26", "31", "36", "40"]
    assert any(row["online_return"] for row in online)
    assert {row["online_return"] for row in metrics if row not in online} == {""}
    assert all(np.isfinite(float(row["flow_loss"])) for row in online), "the flow does not learn from the replay"
    evaluations = read(straight / "evaluations.csv")
    assert [(r["step"], r["episodes"]) for r in evaluations if r["role"] == "policy"] == [
        ("4", "2"),
        (str(OFFLINE), "3"),
        (str(OFFLINE + ONLINE), "3"),
    ]
    results = json.loads((straight / "result.json").read_text())["results"]
    before = [row for row in evaluations if row["step"] == str(OFFLINE)]
    for role, rows in results.items():
        (row,) = (row for row in before if row["role"] == role)
        assert rows["offline"]["score_mean"] == pytest.approx(float(row["score_mean"]), rel=1e-6)
        assert rows["last"]["step"] == OFFLINE + ONLINE


def test_logged_returns_are_those_of_whole_episodes(straight: Path) -> None:
    replay = read_checkpoint(max(straight.glob("checkpoints/*"))).part("replay")
    ends = (replay["rows"].diff() != 1).nonzero().flatten().tolist()
    lengths = np.diff([-1, *ends])
    row = next(row for row in read(straight / "metrics.csv") if row["online_return"])
    ended = [n for n, end in zip(lengths, ends) if OFFLINE + end < int(row["step"])]
    assert float(row["online_return"]) == pytest.approx(np.mean([n * (n + 1) / 2 for n in ended]))


def test_what_an_online_run_prints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = go(tmp_path / "run", "--replay", "balanced", "--freeze-flow-online", online=4)
    printed = capsys.readouterr().out
    line = "4 environment steps, one update each, acting mean-flow-of-16, replay balanced, the flow stays as it is"
    assert f"\nonline     {line}\n" in printed
    offline = json.loads((out / "result.json").read_text())["results"]["policy"]["offline"]
    row = printed.split("score, offline")[1].splitlines()[1]
    assert row.split()[-3:] == [f"{offline['score_mean']:.1f}", "±", f"{offline['score_sem']:.1f}"]


KILLED = """
import os, signal, sys
from tests import test_online
from train import online, run
test_online.register()
step = online.Explorer.step
def fatal(self):
    if self.replay.added == 21:
        os.kill(os.getpid(), signal.SIGKILL)
    step(self)
online.Explorer.step = fatal
run.main(sys.argv[1:])
"""


def test_a_killed_run_ends_where_it_would_have(straight: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    arguments = [*TINY, "--online-steps", str(ONLINE), "--out", str(out)]
    done = subprocess.run(
        [sys.executable, "-c", KILLED, *arguments], cwd=REPOSITORY, capture_output=True, text=True, timeout=PATIENCE
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    checkpoint = read_checkpoint(max(out.glob("checkpoints/*")))
    assert checkpoint.step == 36
    assert checkpoint.notes["online"]["steps"] > 0, "it was not saved in the middle of an episode"
    go(out, "--resume")
    assert_same_run(out, straight)


@pytest.mark.parametrize("step", [OFFLINE - 1, OFFLINE, 19, 33])
def test_a_stopped_run_ends_where_it_would_have(
    straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    out = tmp_path / "run"
    parts = Run.parts

    def stopped(self: Run, stage: Any) -> Any:
        if self.step == step:
            os.kill(os.getpid(), signal.SIGINT)
        return parts(self, stage)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "parts", stopped)
        assert main([*TINY, "--online-steps", str(ONLINE), "--out", str(out)]) == 130
    assert read_checkpoint(max(out.glob("checkpoints/*"))).step == step + 1
    go(out, "--resume")
    assert_same_run(out, straight)


def test_what_was_frozen_learns_again_online(tmp_path: Path) -> None:
    """Presets freeze the flow, and for goals the critics, which must learn from what is seen."""
    out = go(tmp_path / "run", "--freeze-critic-after", "0", "--freeze-flow-after", "0", online=3)
    stages = {row["stage"]: row for row in read(out / "metrics.csv")}
    assert stages["fidec"]["critic_loss"] == "", "the critics are not frozen offline"
    assert stages["fidec"]["flow_loss"] == "", "the flow is not frozen offline"
    assert float(stages["online"]["critic_loss"]) > 0
    assert float(stages["online"]["flow_loss"]) > 0


def test_settings_that_do_not_fit_cost_no_earlier_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = go(tmp_path / "run", online=1)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    flags = ["--encoder", "impala-small", "--online-steps", "0", "--out", str(out), "--overwrite"]
    assert main([*TINY, *flags]) == 2
    assert "states of" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


@pytest.fixture(scope="module")
def offline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run that never went online."""
    register()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("train.outputs.curve.draw_curve", lambda *args: None)
        return go(tmp_path_factory.mktemp("offline") / "run", online=0)


def test_a_finished_offline_run_goes_online_and_further(straight: Path, offline: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(offline, out)
    evaluations = read(out / "evaluations.csv")
    go(out, "--resume", online=5)
    assert read(out / "evaluations.csv")[: len(evaluations)] == evaluations, "the offline agent was evaluated again"
    go(out, "--resume")
    weights, expected = (load_file(path / "policy.safetensors") for path in (out, straight))
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


def test_an_unevaluated_agent_is_evaluated_before_it_goes_online(offline: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(offline, out)
    max(out.glob("checkpoints/*")).unlink()  # there remains that of step 9, which was not evaluated
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, "anneal": False}))
    go(out, "--resume", "--no-anneal", "--steps", "1", online=2)
    assert [row["step"] for row in read(out / "evaluations.csv")] == [*["4"] * 3, *["9"] * 3, *["11"] * 3]


def test_settings_of_the_online_updates_may_change_until_the_first(
    straight: Path, offline: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    shutil.copytree(offline, out)
    go(out, "--resume", "--replay", "balanced", "--online-lr", "1e-4", "--freeze-flow-online", online=3)
    capsys.readouterr()
    refused = [
        (["--online-steps", "3"], "was started with --replay balanced, --online-lr 0.0001, --freeze-flow-online True"),
        (["--online-steps", "0", "--steps", "8"], "--online-steps must be at least 3 to --resume"),
    ]
    for flags, message in refused:
        assert main([*TINY, "--out", str(out), "--resume", *flags]) == 2
        assert message in capsys.readouterr().err
    before = (straight / "config.json").read_text()
    for flags, message in (
        (["--online-steps", "23"], "--online-steps must be at least 24 to --resume"),
        ([], "--online-steps must be at least 24 to --resume"),
        (["--online-steps", "30", "--steps", "9"], "was started with --steps 8"),
    ):
        assert main([*TINY, "--out", str(straight), "--resume", *flags]) == 2
        assert message in capsys.readouterr().err
    assert (straight / "config.json").read_text() == before
    # a preset may ask for more steps where a run goes online, which nobody would notice
    assert main([*TINY, "--no-anneal", "--steps", "9", "--out", str(offline), "--resume", "--online-steps", "3"]) == 2
    assert "finished its --steps 8; go online with that" in capsys.readouterr().err
    unannealed = tmp_path / "unannealed"
    go(unannealed, "--no-anneal", online=0)
    capsys.readouterr()
    flags = ["--no-anneal", "--steps", "5", "--online-steps", "3", "--out", str(unannealed), "--resume"]
    assert main([*TINY, *flags]) == 2
    assert "--steps must be at least 8 to --resume" in capsys.readouterr().err


def made(tmp_path: Path, *flags: str, online: int = ONLINE) -> Run:
    """A run that has trained."""
    config = parse([*TINY, "--online-steps", str(online), "--out", str(tmp_path / "run"), *flags])
    run = Run(config, SPEC, load_dataset(SPEC), torch.device("cpu"))
    config.folder.mkdir()
    run.train()
    return run


def test_online_data_are_on_the_scale_of_the_offline_data(tmp_path: Path) -> None:
    run, data = made(tmp_path, "--n-step", "1", online=6), load_dataset(SPEC)
    replay = run.members[0].explorer.replay
    assert replay.offline is run.dataset
    mean, std = data.observations.mean(0), data.observations.std(0) + 1e-3
    first = replay.online.states[0] * std + mean
    assert torch.allclose(first[1:], torch.zeros(3), atol=1e-5)
    assert torch.equal(replay.online.rewards[:4], torch.arange(1, 5) / data.rewards.std())


@pytest.mark.parametrize(
    ("flags", "moves"),
    [
        ((), True),
        (("--freeze-flow-after", "3"), True),
        (("--freeze-flow-online",), False),
        (("--freeze-flow-after", "3", "--freeze-flow-online"), False),
        (("--freeze-flow-after", "0"), True),
        (("--freeze-flow-after", "0", "--freeze-flow-online"), False),
    ],
)
def test_a_frozen_flow_does_not_change_by_a_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: tuple[str, ...], moves: bool
) -> None:
    before: list[Tensor] = []
    go_online = Run._go_online

    def noted(run: Run) -> Explorer:
        before.extend(p.detach().clone() for p in run.learner.flow.parameters())
        before.append(run.learner.actor[0].weight.detach().clone())
        return go_online(run)

    monkeypatch.setattr(Run, "_go_online", noted)
    run = made(tmp_path, *flags, online=6)
    *flow, actor = before
    changed = [not torch.equal(p, q) for p, q in zip(run.learner.flow.parameters(), flow, strict=True)]
    assert any(changed) == moves
    assert not torch.equal(run.learner.actor[0].weight, actor), "nothing else learns either"


@pytest.mark.parametrize(
    ("flags", "offline_end", "online"),
    [
        (("--lr", "1e-3"), 5e-5 + 9.5e-4 * 0.5 * (1 + np.cos(np.pi * 7 / 8)), 3e-4),
        (("--lr", "1e-3", "--online-lr", "None"), 5e-5 + 9.5e-4 * 0.5 * (1 + np.cos(np.pi * 7 / 8)), 1e-3),
        (("--lr", "1e-3", "--online-lr", "2e-4"), 5e-5 + 9.5e-4 * 0.5 * (1 + np.cos(np.pi * 7 / 8)), 2e-4),
        (("--no-anneal", "--lr", "2e-4", "--online-lr", "None"), 2e-4, 2e-4),
    ],
)
def test_the_learning_rate_online_is_constant(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: tuple[str, ...], offline_end: float, online: float
) -> None:
    rates: list[float] = []
    update = Run._update

    def noted(run: Run, *args: Any) -> Any:
        rates.append(run.optimizer.param_groups[0]["lr"])
        return update(run, *args)

    monkeypatch.setattr(Run, "_update", noted)
    made(tmp_path, *flags, online=6)
    assert rates[OFFLINE - 1] == pytest.approx(offline_end)
    assert rates[OFFLINE:] == [online] * 6


@pytest.mark.parametrize(
    ("what", "value"), [("reward", np.nan), ("observation", np.inf), ("observation", 1e39), ("reward", 1e39)]
)
def test_what_the_environment_answers_is_looked_at(
    what: str, value: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also numbers that are infinite only in float32."""
    step = Counting.step

    def spoilt(env: Counting, action: np.ndarray) -> Any:
        observation, reward, *rest = step(env, action)
        if env.count == 3:
            reward = value if what == "reward" else reward
            observation[2] = value if what == "observation" else observation[2]
        return observation, reward, *rest

    monkeypatch.setattr(Run, "evaluate", lambda run: None)
    monkeypatch.setattr(Counting, "step", spoilt)
    with pytest.raises(RunError, match=rf"environment: the {what} in step 3 of episode 1 has (inf|nan)") as refused:
        made(tmp_path, online=6)
    assert f"seed 0 diverged at update {OFFLINE + 3} (online)" in str(refused.value)


def test_the_first_nan_online_is_saved_with_its_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sample = AGENTS["fidec"].sample

    def spoilt(agent: Agent, dataset: OfflineDataset | Replay, *args: Any) -> Any:
        batch, draws = sample(agent, dataset, *args)
        if isinstance(dataset, Replay) and dataset.added == 3:
            batch.actions[5, 1] = torch.nan
        return batch, draws

    monkeypatch.setattr(AGENTS["fidec"], "sample", spoilt)
    with pytest.raises(RunError, match=rf"at update {OFFLINE + 3} \(online\): not finite are batch: actions; losses"):
        made(tmp_path, online=6)
    (path,) = tmp_path.rglob("diverged.safetensors")
    assert diverged.main([str(path.parent)]) == 0, "it needs neither the environment nor the replay"


def test_settings_reach_the_replay_and_the_explorer(tmp_path: Path) -> None:
    run = made(tmp_path, "--n-step", "3", "--online-acting", "best-flow-of-n", "--acting-samples", "5", online=6)
    explorer, discount = run.members[0].explorer, run.config.hyper.discount
    assert (explorer.acting.rule, explorer.acting.num_samples) == ("best-flow-of-n", 5)
    assert run.config.acts.rule == "mean-flow-of-n"
    offline, online = run.dataset.n_step(3, discount), explorer.replay.online
    for name in ("rewards", "masks", "next_rows", "next_steps"):
        assert torch.equal(getattr(explorer.replay.offline, name), getattr(offline, name)), name
    ends = FALL if explorer.replay.online.masks[3] == 0 else LIMIT
    paid = [sum(discount**i * (step + i + 1) for i in range(min(3, ends - step))) for step in range(4)]
    scale = load_dataset(SPEC).rewards.std().item()
    assert online.rewards[:4].tolist() == pytest.approx([reward / scale for reward in paid], rel=1e-6)
    assert online.next_rows[:4].tolist() == [min(step + 3, ends) for step in range(4)]


def test_updates_learn_from_the_replay_only_online(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sources: list[tuple[int, int]] = []
    sample = AGENTS["fidec"].sample

    def noted(agent: Agent, dataset: OfflineDataset | Replay, *args: Any) -> Any:
        sources.append((len(dataset), getattr(dataset, "added", -1)))
        return sample(agent, dataset, *args)

    monkeypatch.setattr(AGENTS["fidec"], "sample", noted)
    made(tmp_path, online=4)
    n = len(load_dataset(SPEC))
    assert sources == [(n, -1)] * OFFLINE + [(n + i, i) for i in range(1, 5)]


def test_the_curve_marks_where_online_begins(
    straight: Path, offline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    figures: list[Any] = []
    monkeypatch.setattr(curve, "png_of", lambda figure, dpi: figures.append(figure) or b"")
    for out in (straight, offline):
        flags = ["--online-steps", str(ONLINE)] if out is straight else []
        folder = tmp_path / out.parent.name
        shutil.copytree(out, folder)
        curve.draw_curve(folder, parse([*TINY, *flags]), 50.0, "score")
    marked, unmarked = (
        [
            (line.get_xdata()[0], ax.texts[0].get_text().strip(), ax.texts[0].get_position()[0])
            for ax in figure.axes
            for line in ax.lines
            if ax.texts and list(line.get_ydata()) == [0, 1]
        ]
        for figure in figures
    )
    # the score counts from the end of the flow's warm-up, the panels from the agent's first update
    assert marked == [(12, "online", 12), *[(8, "online", 8)] * 3]
    assert unmarked == []


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--online-steps", "-1"], "--online-steps must be zero or more, got -1"),
        (["--online-steps", "5", "--num-seeds", "2"], "--online-steps must be 0 with several seeds"),
        (["--freeze-flow-online"], "--freeze-flow-online must be False without --online-steps, got True"),
        (["--replay", "balanced"], "--replay must be all without --online-steps, got balanced"),
        (["--online-lr", "1e-4"], "--online-lr must be None without --online-steps, got 0.0001"),
        (["--online-steps", "5", "--online-lr", "0"], "--online-lr must be positive, got 0.0"),
        (["--online-steps", "5", "--replay", "new"], "replay"),
        (["--online-steps", "5", "--replay", "balanced", "--batch-size", "7"], "--batch-size must be even with"),
        (["--online-acting", "best-flow-of-n"], "--online-acting must be None without --online-steps"),
        (
            ["--agent", "fql", "--online-steps", "5", "--online-acting", "iterated"],
            "--online-acting must be a rule without",
        ),
    ],
)
def test_refusals(flags: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        main([*TINY, "--out", str(tmp_path / "run"), *flags])
    assert exit_info.value.code == 2
    captured = capsys.readouterr()
    assert message in " ".join((captured.err + captured.out).replace("│", " ").split())


def test_one_seed_of_a_group_goes_online_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("train.outputs.curve.draw_group_curve", lambda *args: None)
    assert main([*TINY, "--num-seeds", "2", "--out", str(tmp_path)]) == 0
    go(tmp_path / "fidec-seed1", "--seed", "1", "--resume", online=5)
    rows = read(tmp_path / "fidec-seed1" / "metrics.csv")
    assert (rows[-1]["stage"], rows[-1]["step"]) == ("online", str(OFFLINE + 5))
    assert set(ONLINE_METRICS) <= rows[-1].keys()
