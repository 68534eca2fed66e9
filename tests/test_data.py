"""Rollouts, the datasets made of them, and the sources of data. No test uses the network."""

import dataclasses
import http.server
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import gymnasium as gym
import h5py
import huggingface_hub
import minari
import numpy as np
import pytest
import torch

from tests.read_errors import PASSING, SAID, fail, files_in
from train import run
from train.behaviour import rollout
from train.behaviour.policy import POLICIES, BehaviourPolicy
from train.data import generated, hdf5, hosted, minari_cache, network, room
from train.data.episode import BadEpisode, Episode, check_episodes
from train.data.load import load_dataset
from train.data.spec import DatasetUnavailable
from train.data.transitions import Batch, OfflineDataset
from train.environments import resolve

HOPPER = resolve("hopper-medium")
HOPPER_BOTH = resolve("hopper-medium-expert")
MEDIUM, EXPERT = HOPPER_BOTH.sources[0].dataset_ids  # Minari's names
OBS, ACTIONS = 11, 3  # Hopper's


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """An empty Minari cache, tiny datasets, and a hub that refuses the connection."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    monkeypatch.setattr(generated, "EPISODES", {"default": 5, "full": 9})
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        set_hub(monkeypatch, f"http://127.0.0.1:{unused.getsockname()[1]}")
    yield tmp_path / "minari"
    huggingface_hub.close_session()  # it may hold this test's proxy


def set_hub(monkeypatch, url: str) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", url)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    huggingface_hub.close_session()


@pytest.fixture
def policies(tmp_path) -> Path:
    """Randomly initialised behaviour policies for Hopper. It soon falls over, so episodes have only tens of steps."""
    folder = tmp_path / "policies"
    folder.mkdir()
    for i, name in enumerate(HOPPER_BOTH.sources[1].policies):
        rng = np.random.default_rng(i)
        shapes = {"trunk.0": (8, OBS), "trunk.2": (8, 8), "mean": (ACTIONS, 8), "log_std": (ACTIONS, 8)}
        weights = {f"{layer}.weight": 0.3 * rng.standard_normal(shape) for layer, shape in shapes.items()}
        weights |= {f"{layer}.bias": np.zeros(shape[0]) for layer, shape in shapes.items()}
        policy = BehaviourPolicy({key: value.astype(np.float16) for key, value in weights.items()})
        policy.save(folder / f"{name}.safetensors", {"return_mean": "1.0"})
    return folder


def random_policy(obs: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return rng.uniform(-1, 1, (len(obs), 6 if obs.shape[1] == 17 else ACTIONS)).astype(np.float32)


def episode(steps: int, *, terminated: bool, first: float = 0.0) -> Episode:
    """An episode whose numbers tell their position: o_i = first + i, r_i = 10 o_i, a_i = o_i / 1000."""
    return Episode(
        observations=first + np.arange(steps + 1.0)[:, None],
        actions=(first + np.arange(steps))[:, None] / 1000,
        rewards=10 * (first + np.arange(steps)),
        masks=np.arange(steps) < steps - terminated,
    )


# --- rollouts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("env_id", "episodes", "num_envs"), [("Hopper-v5", 7, 3), ("Hopper-v5", 2, 4), ("HalfCheetah-v5", 3, 2)]
)
def test_stored_seed_and_actions_replay_the_episode(env_id: str, episodes: int, num_envs: int) -> None:
    played = list(rollout.collect(env_id, random_policy, episodes=episodes, seed=3, num_envs=num_envs))
    assert len(played) == episodes
    env = gym.make(env_id)
    for e in played:
        obs, _ = env.reset(seed=e.seed)
        for t, action in enumerate(e.actions):
            np.testing.assert_array_equal(e.observations[t], obs.astype(np.float32), f"observation {t}")
            obs, reward, terminated, truncated, _ = env.step(action)
            assert e.rewards[t] == reward, f"reward {t}"
            assert (e.terminations[t], e.truncations[t]) == (terminated, truncated), f"flags {t}"
        assert terminated or truncated, "the episode was cut short"
        np.testing.assert_array_equal(e.observations[-1], obs.astype(np.float32), "final observation")
        assert len(e.observations) == len(e.actions) + 1
    env.close()


def test_rollouts_keep_the_episodes_that_start_first() -> None:
    # keeping the first to end would leave out long episodes
    played = list(rollout.collect("Hopper-v5", random_policy, episodes=9, seed=5, num_envs=4))
    assert sorted(e.seed for e in played) == sorted(np.random.default_rng(5).integers(2**31, size=9))


def test_rollouts_are_deterministic() -> None:
    def returns(seed: int) -> list[float]:
        return [e.rewards.sum() for e in rollout.collect("Hopper-v5", random_policy, episodes=5, seed=seed)]

    assert returns(1) == returns(1)
    assert returns(1) != returns(2)


# --- transitions ------------------------------------------------------------------------------------------------------


def test_transitions_stay_within_their_episode() -> None:
    dataset = OfflineDataset.from_episodes([episode(3, terminated=True), episode(2, terminated=False, first=100)])
    assert dataset.observations.squeeze(1).tolist() == [0, 1, 2, 100, 101]
    assert dataset.next_observations.squeeze(1).tolist() == [1, 2, 3, 101, 102]
    assert dataset.rewards.tolist() == [0, 10, 20, 1000, 1010]
    torch.testing.assert_close(dataset.actions.squeeze(1), torch.tensor([0, 1, 2, 100, 101]) / 1000)
    torch.testing.assert_close(dataset.next_actions.squeeze(1), torch.tensor([1, 2, 2, 101, 101]) / 1000)
    assert dataset.masks.tolist() == [1, 1, 0, 1, 1], "only a true termination masks the next value"
    assert dataset.outcomes.returns.tolist() == [30, 2010]
    assert {column.dtype for column in dataset.sample(2)} == {torch.float32}


def test_targets_over_several_steps() -> None:
    dataset = OfflineDataset.from_episodes([episode(4, terminated=True), episode(3, terminated=False, first=100)])
    three = dataset.n_step(3, discount=0.5)
    assert three.rewards.tolist() == [0 + 5 + 5, 10 + 10 + 7.5, 20 + 15, 30, 1000 + 505 + 255, 1010 + 510, 1020]
    assert three.next_observations.squeeze(1).tolist() == [3, 4, 4, 4, 103, 103, 103]
    assert three.masks.tolist() == [0.25, 0, 0, 0, 0.25, 0.5, 1], "what has ended has no value; a time limit is no end"
    torch.testing.assert_close(three.next_actions[:1], dataset.next_actions[2:3])
    assert torch.equal(three.observations, dataset.observations)
    assert torch.equal(three.actions, dataset.actions)
    whole, endless = dataset.n_step(4, discount=0.5), dataset.n_step(10**12, discount=0.5)
    assert all(torch.equal(getattr(endless, name), getattr(whole, name)) for name in Batch._fields)
    one = dataset.n_step(1, discount=0.5)
    assert all(torch.equal(getattr(one, name), getattr(dataset, name)) for name in Batch._fields)
    moved = dataclasses.replace(dataset.to("meta"), masks=dataset.masks)  # which steps there are depends on the masks
    assert moved.n_step(3, discount=0.5).rewards.device.type == "meta", "it stays where it is"


def test_observations_that_lie_in_one_array_are_not_copied() -> None:
    file = np.arange(40, dtype=np.float32).reshape(20, 2)
    episodes = [
        Episode(file[a:b], np.zeros((b - a - 1, 1)), np.zeros(b - a - 1), np.ones(b - a - 1, bool))
        for a, b in ((3, 8), (8, 10), (10, 17))
    ]
    dataset = OfflineDataset.from_episodes(episodes)
    assert dataset.states.data_ptr() == file[3:].ctypes.data
    assert dataset.states.shape == (14, 2)
    for chosen in ([0, 2], [1, 0]):  # not in a row
        copied = OfflineDataset.from_episodes([episodes[i] for i in chosen])
        np.testing.assert_array_equal(copied.states, np.concatenate([episodes[i].observations for i in chosen]))
    wider = OfflineDataset.from_episodes([e._replace(observations=e.observations.astype(np.float64)) for e in episodes])
    assert torch.equal(wider.states, dataset.states)
    narrow = OfflineDataset.from_episodes([e._replace(observations=e.observations[:, :1]) for e in episodes])
    assert torch.equal(narrow.states, dataset.states[:, :1])
    for name in Batch._fields:
        assert torch.equal(getattr(wider, name), getattr(dataset, name)), name
    batch = dataset.take(torch.arange(len(dataset)))
    assert all(torch.equal(column, getattr(dataset, name)) for name, column in zip(Batch._fields, batch))


def test_targets_stop_where_a_goal_is_reached_within_an_episode() -> None:
    reached = episode(5, terminated=False)._replace(masks=np.array([1, 1, 0, 1, 1], bool))
    three = OfflineDataset.from_episodes([reached, reached]).n_step(3, discount=0.5)
    assert three.rewards.tolist() == [0 + 5 + 5, 10 + 10, 20, 30 + 20, 40] * 2
    assert three.next_observations.squeeze(1).tolist() == [3, 3, 3, 5, 5] * 2
    assert three.masks.tolist() == [0, 0, 0, 0.5, 1] * 2


def test_masks_of_a_terminating_environment() -> None:
    played = list(rollout.collect("Hopper-v5", random_policy, episodes=6, seed=0))
    dataset = OfflineDataset.from_episodes([minari_cache.as_episode(e) for e in played])
    ends = np.cumsum([len(e) for e in played]) - 1
    assert np.flatnonzero(dataset.masks.numpy() == 0).tolist() == ends.tolist()
    for end, e in zip(ends, played):
        np.testing.assert_array_equal(dataset.next_observations[end], e.observations[-1])


def test_actions_are_clipped_into_the_open_interval() -> None:
    e = Episode(np.zeros((4, 1)), np.array([[-1.0], [0.25], [1.0]]), np.zeros(3), np.ones(3, bool))
    actions = OfflineDataset.from_episodes([e]).actions
    torch.testing.assert_close(actions, torch.tensor([[-1 + 1e-5], [0.25], [1 - 1e-5]]), rtol=0, atol=1e-7)
    assert torch.atanh(actions).isfinite().all()


def test_sample_draws_whole_rows_and_repeats_with_its_generator() -> None:
    dataset = OfflineDataset.from_episodes([episode(50, terminated=True)])

    def draw(seed: int) -> Batch:
        return dataset.sample(400, torch.Generator().manual_seed(seed))

    batch = draw(0)
    assert batch.observations.shape == (400, 1)
    torch.testing.assert_close(batch.rewards, 10 * batch.observations.squeeze(1))
    torch.testing.assert_close(batch.next_observations, batch.observations + 1)
    torch.testing.assert_close(batch.masks, (batch.observations.squeeze(1) != 49).float())
    assert len(batch.rewards.unique()) == 50, "some transitions are never drawn"
    assert all(torch.equal(a, b) for a, b in zip(batch, draw(0)))
    assert not torch.equal(batch.rewards, draw(1).rewards)


def test_to_moves_every_column() -> None:
    moved = OfflineDataset.from_episodes([episode(3, terminated=True)], ("id",), ("line",)).to("meta")
    assert {column.device.type for column in moved.sample(2)} == {"meta"}
    assert (moved.dataset_ids, moved.source) == (("id",), ("line",))


# --- where the data comes from ----------------------------------------------------------------------------------------


def forbid_generation(monkeypatch) -> None:
    def fail(*args, **kwargs):
        raise AssertionError("generated instead of read")

    monkeypatch.setattr(generated, "store_rollouts", fail)


def host(monkeypatch, policies: Path, episodes: dict[str, int]) -> list[str]:
    """Replace Minari's server: downloads put these datasets into the cache. Returns the list of requested ids."""
    asked = []

    def download(dataset_id: str, force_download: bool = False) -> None:
        asked.append(dataset_id)
        folder = hosted.get_dataset_path(dataset_id)
        if folder.exists() and not force_download:
            return  # Minari does so
        shutil.rmtree(folder, ignore_errors=True)
        folder.parent.mkdir(parents=True, exist_ok=True)
        policy = policies / f"{HOPPER.sources[1].policies[0]}.safetensors"
        rollout.store_rollouts(folder, dataset_id, HOPPER, policy, episodes[dataset_id])

    monkeypatch.setattr(minari, "download_dataset", download)
    monkeypatch.setattr(hosted, "_hub_problem", lambda: None)
    return asked


def test_generated_once_then_read_from_the_cache(cache, policies, monkeypatch) -> None:
    first = load_dataset(HOPPER, policies=policies)
    (dataset_id,) = first.dataset_ids
    assert re.fullmatch("fdkernels/hopper/medium-[0-9a-f]{8}-5ep-v0", dataset_id)
    assert "cannot be reached" in first.source[0]
    assert "generated now" in first.source[1]
    forbid_generation(monkeypatch)
    again = load_dataset(HOPPER, policies=policies)
    assert "local cache" in again.source[1]
    assert str(cache) in again.source[0], "does not say where the rollouts are"
    for column in Batch._fields:
        assert torch.equal(getattr(first, column), getattr(again, column)), column


def test_generated_data_does_not_depend_on_where_it_is(tmp_path, policies, monkeypatch) -> None:
    first = load_dataset(HOPPER, policies=policies, download=False)
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "other"))
    second = load_dataset(HOPPER, policies=policies, download=False)
    assert "generated now" in second.source[1]
    assert torch.equal(first.rewards, second.rewards)


def test_generated_dataset_is_a_minari_dataset_with_its_history(policies) -> None:
    dataset = load_dataset(HOPPER, policies=policies, download=False)
    stored = minari.load_dataset(*dataset.dataset_ids)
    assert list(minari.list_local_datasets()) == [stored.id]
    assert (stored.total_episodes, stored.total_steps) == (5, len(dataset))
    assert stored.env_spec.id == "Hopper-v5"
    metadata = stored.storage.metadata
    assert metadata["policy"] == {"return_mean": "1.0"}
    assert any(requirement.startswith("mujoco==") for requirement in metadata["requirements"])
    seeds = [e["seed"] for e in stored.storage.get_episode_metadata(range(5))]
    assert len(set(seeds)) == 5
    scores = minari.get_normalized_score(stored, dataset.outcomes.returns)
    np.testing.assert_allclose(100 * scores, HOPPER.scoring(dataset.outcomes))


def test_policies_do_not_clash(tmp_path, policies, monkeypatch) -> None:
    shipped = load_dataset(HOPPER, download=False)
    assert shipped.dataset_ids == ("fdkernels/hopper/medium-5ep-v0",)
    others = load_dataset(HOPPER, policies=policies, download=False)
    assert "generated now" in others.source[1]
    assert others.dataset_ids != shipped.dataset_ids
    copied, empty = tmp_path / "copied", tmp_path / "empty"
    shutil.copytree(POLICIES, copied)
    empty.mkdir()
    forbid_generation(monkeypatch)
    assert torch.equal(load_dataset(HOPPER, policies=copied, download=False).rewards, shipped.rewards)
    assert torch.equal(load_dataset(HOPPER, policies=policies, download=False).rewards, others.rewards)
    with pytest.raises(DatasetUnavailable, match="lacks a behaviour policy for it"):
        load_dataset(HOPPER, policies=empty, download=False)


def test_sizes_do_not_clash(policies) -> None:
    default = load_dataset(HOPPER, policies=policies, download=False)
    full = load_dataset(HOPPER, policies=policies, download=False, size="full")
    assert (len(default.outcomes.returns), len(full.outcomes.returns)) == (5, 9)


def test_medium_expert_is_both(policies) -> None:
    medium = load_dataset(HOPPER, policies=policies, download=False)
    expert = load_dataset(resolve("hopper-expert"), policies=policies, download=False)
    both = load_dataset(HOPPER_BOTH, policies=policies, download=False)
    assert len(both.outcomes.returns) == 10
    for column in Batch._fields:
        assert torch.equal(getattr(both, column), torch.cat([getattr(medium, column), getattr(expert, column)])), column
    assert len(both.source) == 3
    assert f"{len(medium):,} transitions, mean return {medium.outcomes.returns.mean():,.0f}" in both.source[1]
    assert f"{len(expert):,} transitions, mean return {expert.outcomes.returns.mean():,.0f}" in both.source[2]


def test_hosted_data_is_downloaded_then_cached(policies, monkeypatch) -> None:
    asked = host(monkeypatch, policies, {MEDIUM: 4, EXPERT: 6})
    both = load_dataset(HOPPER_BOTH)
    assert asked == [MEDIUM, EXPERT] == list(both.dataset_ids)
    assert len(both.outcomes.returns) == 10
    assert all("downloaded now" in line for line in both.source)
    again = load_dataset(HOPPER_BOTH)
    assert asked == [MEDIUM, EXPERT], "downloaded twice"
    assert all("local cache" in line for line in again.source)


def test_hosted_and_generated_parts_are_not_mixed(policies, monkeypatch) -> None:
    host(monkeypatch, policies, {MEDIUM: 4})
    assert len(load_dataset(HOPPER).outcomes.returns) == 4
    both = load_dataset(HOPPER_BOTH, policies=policies)  # the expert part is not hosted, which raises KeyError
    assert all(dataset_id.startswith("fdkernels/") for dataset_id in both.dataset_ids)
    assert "failed (KeyError" in both.source[0]


def test_interrupted_download_is_completed(cache, policies, monkeypatch) -> None:
    asked = host(monkeypatch, policies, {MEDIUM: 4})
    partial = cache / MEDIUM / "data"
    partial.mkdir(parents=True)
    (partial / "metadata.json").write_text(json.dumps({"total_episodes": 4}))
    assert len(load_dataset(HOPPER).outcomes.returns) == 4
    assert asked == [MEDIUM]


# --- no network -------------------------------------------------------------------------------------------------------


def check_unavailable(tmp_path: Path, reason: str) -> None:
    started = time.monotonic()
    with pytest.raises(DatasetUnavailable) as error:
        load_dataset(HOPPER, policies=tmp_path)
    assert time.monotonic() - started < 15
    message = str(error.value)
    for part in (HOPPER.name, reason, os.environ["MINARI_DATASETS_PATH"], "minari download mujoco/hopper/medium-v0"):
        assert part in message, f"{part!r} not in {message!r}"
    assert f"{tmp_path} lacks a behaviour policy for it, has them for none" in message


def test_offline_error_is_quick_and_says_what_to_do(tmp_path) -> None:
    check_unavailable(tmp_path, "cannot be reached")


def test_offline_error_names_what_can_be_had(policies) -> None:
    with pytest.raises(DatasetUnavailable, match="has them for hopper-medium, hopper-expert, hopper-medium-expert\n"):
        load_dataset(resolve("walker2d-medium"), policies=policies, download=False)


def test_a_hub_that_never_answers_costs_seconds(tmp_path, monkeypatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:  # accepts connections but never answers
        set_hub(monkeypatch, f"http://127.0.0.1:{silent.getsockname()[1]}")
        check_unavailable(tmp_path, "http://127.0.0.1")


def test_a_name_look_up_that_hangs_costs_seconds(tmp_path, monkeypatch) -> None:
    release = threading.Event()

    def getaddrinfo(*args, **kwargs):
        release.wait(30)
        raise socket.gaierror("gave up")

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    monkeypatch.setattr(network, "PROBE_SECONDS", 0.5)
    set_hub(monkeypatch, "http://hub.invalid")
    check_unavailable(tmp_path, "did not answer within 0.5 s")
    release.set()


def test_offline_mode_of_the_hub_is_respected(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    check_unavailable(tmp_path, "HF_HUB_OFFLINE")


@pytest.mark.parametrize(("status", "problem"), [(200, ""), (404, ""), (403, "403"), (407, "407"), (503, "503")])
def test_hub_behind_a_proxy(monkeypatch, status: int, problem: str) -> None:
    seen = []

    class Proxy(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            seen.append(self.path)
            self.send_response(status)
            self.end_headers()

        def log_message(self, *args) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Proxy) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{server.server_port}")
        set_hub(monkeypatch, "http://hub.invalid")
        assert problem in (hosted._hub_problem() or "")
        assert bool(hosted._hub_problem()) == bool(problem)
        server.shutdown()
    assert set(seen) == {"http://hub.invalid/"}


# --- faults -----------------------------------------------------------------------------------------------------------


def truncate(cache: Path, dataset_id: str) -> Path:
    file = cache / dataset_id / "data" / "main_data.hdf5"
    os.truncate(file, file.stat().st_size // 2)
    return file


def test_damaged_generated_data_is_made_again(cache, policies) -> None:
    before = load_dataset(HOPPER, policies=policies, download=False)
    truncate(cache, before.dataset_ids[0])
    after = load_dataset(HOPPER, policies=policies, download=False)
    assert "generated again because the copy in the cache was damaged" in after.source[1]
    assert torch.equal(before.rewards, after.rewards)


@pytest.mark.parametrize("fault", SAID)
@pytest.mark.parametrize("dataset_id", ["fdkernels/hopper/medium-5ep-v0", MEDIUM])
def test_what_says_nothing_about_data_costs_none(
    cache, policies, monkeypatch, capsys, dataset_id: str, fault: str
) -> None:
    policy = policies / f"{HOPPER.sources[1].policies[0]}.safetensors"
    (cache / dataset_id).parent.mkdir(parents=True)
    rollout.store_rollouts(cache / dataset_id, dataset_id, HOPPER, policy, 2)
    before = files_in(cache)
    capsys.readouterr()
    with monkeypatch.context() as faulty:
        forbid_generation(faulty)
        if fault in PASSING:
            faulty.setattr(hdf5.Arrays, "find", fail(PASSING[fault]))
        else:
            faulty.setattr(room, "available", lambda: 9)
        flags = ["--env", HOPPER.name, "--dataset-size", "5", "--device", "cpu", "--out", str(cache.parent / "run")]
        assert run.main(flags) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert SAID[fault] in line
    assert str(cache / dataset_id / "data" / "main_data.hdf5") in line
    assert files_in(cache) == before
    assert "local cache" in "".join(load_dataset(HOPPER).source)


def test_generated_data_that_cannot_be_read_back(cache, policies, monkeypatch) -> None:
    def store(folder: Path, *args, store_rollouts=generated.store_rollouts) -> None:
        store_rollouts(folder, *args)
        os.truncate(folder / "data" / "main_data.hdf5", 1000)

    monkeypatch.setattr(generated, "store_rollouts", store)
    with pytest.raises(DatasetUnavailable, match=f"{cache}.* cannot be read .*truncated file"):
        load_dataset(HOPPER, policies=policies, download=False)


def test_damaged_hosted_data_is_refused_by_its_folder(cache, policies, monkeypatch) -> None:
    host(monkeypatch, policies, {MEDIUM: 4})
    load_dataset(HOPPER)
    folder = truncate(cache, MEDIUM).parent.parent
    with pytest.raises(DatasetUnavailable, match=r"truncated file[\s\S]*delete the folder") as error:
        load_dataset(HOPPER, policies=policies)
    assert str(folder) in str(error.value)


def bad_episodes() -> dict[str, tuple[Episode, str]]:
    good = episode(4, terminated=True)
    observations, actions, rewards, masks, _ = good

    def with_one(column: np.ndarray, value: float) -> np.ndarray:
        changed = column.copy()
        changed.flat[2] = value
        return changed

    return {
        "an observation is missing": (good._replace(observations=observations[:-1]), r"observations of shape \(4, 1\)"),
        "a reward is missing": (good._replace(rewards=rewards[1:]), r"rewards of shape \(3,\), and \(4,\) would fit"),
        "a mask is missing": (good._replace(masks=masks[1:]), r"masks of shape \(3,\)"),
        "wider observations": (good._replace(observations=np.zeros((5, 2))), r"observations of shape \(5, 2\)"),
        "wider actions": (good._replace(actions=np.zeros((4, 3))), r"actions of shape \(4, 3\)"),
        "flat actions": (good._replace(actions=np.zeros(4)), r"actions of shape \(4,\)"),
        "no steps": (Episode(np.zeros((1, 1)), np.zeros((0, 1)), np.zeros(0), np.zeros(0, bool)), "no steps"),
        "NaN observation": (good._replace(observations=with_one(observations, np.nan)), r"nan in its observations.*2"),
        "NaN action": (good._replace(actions=with_one(actions, np.nan)), "nan in its actions"),
        "infinite in float32": (good._replace(rewards=with_one(rewards, 1e39)), r"1e\+39 in its rewards, at \(2,\)"),
        "infinite reward": (good._replace(rewards=with_one(rewards, np.inf)), r"inf in its rewards, at \(2,\)"),
        "too large an action": (good._replace(actions=with_one(actions, -1.01)), r"action -1.01 outside.*at \(2, 0\)"),
    }


@pytest.mark.parametrize("what", bad_episodes())
def test_bad_episodes_are_refused_by_number(what: str) -> None:
    bad, message = bad_episodes()[what]
    good = episode(3, terminated=False)
    check_episodes([good, good])
    with pytest.raises(BadEpisode, match=f"^episode 1 has .*{message}"):
        check_episodes([good, bad, good])
    if "wide" not in what:  # the first episode says how wide they are
        with pytest.raises(BadEpisode, match=r"^episode 0 has"):
            check_episodes([bad])


def test_no_episodes_are_refused() -> None:
    with pytest.raises(BadEpisode, match="no episodes"):
        check_episodes([])


def test_a_bad_dataset_is_refused_by_name(policies, monkeypatch) -> None:
    def spoilt(dataset_id: str, read=minari_cache.read) -> list[Episode]:
        first, *others = read(dataset_id)
        return [first, *(e._replace(rewards=np.full_like(e.rewards, np.nan)) for e in others)]

    monkeypatch.setattr(minari_cache, "read", spoilt)
    with pytest.raises(DatasetUnavailable, match=r"^fdkernels/hopper/medium-\w+-5ep-v0 .*episode 1 has nan in"):
        load_dataset(HOPPER, policies=policies, download=False)


@pytest.mark.parametrize(("flags", "message"), [("none", "has no end"), ("middle", "goes on after it terminated")])
def test_episodes_without_an_end_are_refused(cache, policies, flags: str, message: str) -> None:
    dataset = load_dataset(HOPPER, policies=policies, download=False)
    with h5py.File(cache / dataset.dataset_ids[0] / "data" / "main_data.hdf5", "a") as file:
        stored = file["episode_2"]
        stored["terminations"][:] = False
        stored["truncations"][:] = False
        if flags == "middle":
            stored["terminations"][1] = stored["truncations"][-1] = True
    with pytest.raises(minari_cache.Unreadable, match=f"episode 2 {message}"):
        minari_cache.read(dataset.dataset_ids[0])


KILLED_HALF_WAY = """
import sys, time
from pathlib import Path
from train import environments
from train.data import generated, load
from train.behaviour import rollout

def collect(*args, collect=rollout.collect, **kwargs):
    yield next(collect(*args, **kwargs))
    print("half way", flush=True)
    time.sleep(60)

rollout.collect = collect
generated.EPISODES["default"] = 5
load.load_dataset(environments.resolve("hopper-medium"), download=False, policies=Path(sys.argv[1]))
"""


def test_a_kill_while_generating_leaves_nothing_behind(cache, policies) -> None:
    child = subprocess.Popen([sys.executable, "-c", KILLED_HALF_WAY, policies], stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout.readline() == "half way\n"
        assert len(list(cache.rglob("main_data.hdf5"))) == 1, "not killed in the middle of anything"
    finally:
        child.send_signal(signal.SIGKILL)
        child.communicate()
    assert minari.list_local_datasets() == {}
    dataset = load_dataset(HOPPER, policies=policies, download=False)
    assert "generated now" in dataset.source[1]
    assert len(dataset.outcomes.returns) == 5
    assert len(list(cache.rglob("main_data.hdf5"))) == 1, "the killed run's half is still there"


def test_two_runs_at_once_generate_once(policies, monkeypatch) -> None:
    calls = []

    def counted(*args, store=generated.store_rollouts):
        calls.append(args)
        time.sleep(0.3)  # long enough for the other process to arrive
        store(*args)

    monkeypatch.setattr(generated, "store_rollouts", counted)
    with ThreadPoolExecutor(2) as pool:
        runs = [pool.submit(load_dataset, HOPPER, policies=policies, download=False) for _ in range(2)]
        first, second = (run.result() for run in runs)
    assert len(calls) == 1
    assert torch.equal(first.rewards, second.rewards)


def test_failed_generation_leaves_nothing_behind(cache, policies, monkeypatch) -> None:
    def broken(*args, **kwargs):
        raise OSError("no space left on device")

    monkeypatch.setattr(rollout, "collect", broken)
    with pytest.raises(OSError, match="no space left"):
        load_dataset(HOPPER, policies=policies, download=False)
    assert [path for path in cache.rglob("*") if path.is_file() and path.suffix != ".lock"] == []
