"""Images as observations: encoders, stacked frames, random shifts, and files that are larger than memory."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import zipfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fdkernels.policy import Acting, Policy, load_policy
from fdkernels.policy.encoder import FEATURES, ImpalaSmall
from fdkernels.policy.network import NETWORKS
from train import play, run
from train.agents import AGENTS
from train.agents.augmentation import shifted
from train.agents.base import ALL_PARTS, Agent, Parts
from train.agents.seeds import SeedGroup
from train.behaviour import scripted
from train.data import ogbench, published
from train.data.episode import Episode, check_episodes
from train.data.load import load_dataset
from train.data.spec import DatasetUnavailable, EnvSpec, NormalizedReturn
from train.data.transitions import Batch, OfflineDataset
from train.data.unpacked import mapped
from train.environments import resolve
from train.loop import Run
from train.outputs.checkpoint import read_checkpoint, save_checkpoint
from train.outputs.policy import save_policy
from train.presets import preset_config
from train.rendering import render_off_screen
from train.settings import RunConfig, RunError, check_observations
from train.simulator import kept_vector_env

FRAME, SHAPE = (8, 8, 3), (8, 8, 9)
BATCH = 16
SMALL: dict[str, Any] = {
    **{"actor_hidden": (16, 16), "critic_hidden": (16,), "flow_steps": 3, "num_fisher_samples": 2},
    **{"encoder": "impala-small", "frame_stack": 3, "augment": 0.5},
}
ROOT = Path(__file__).parents[1]
VISUAL = resolve("visual-antmaze-medium-navigate-singletask-task1-v0")


def make(name: str = "fidec", seed: int = 0, **changes: object) -> Agent:
    torch.manual_seed(seed)
    kind = AGENTS[name]
    return kind(kind.hyperparameters(**{**SMALL, **changes}), SHAPE, 2)


def coloured(lengths: Sequence[int] = (40, 3, 80)) -> OfflineDataset:
    """Noisy images in one colour each. Red and green tell the action, and red the reward, which ends everything."""
    rng, episodes = np.random.default_rng(0), []
    for steps in lengths:
        colours = rng.uniform(0, 1, (steps + 1, 1, 1, 3))
        images = np.clip(250 * colours + rng.uniform(0, 5, (steps + 1, *FRAME)), 0, 255).astype(np.uint8)
        actions = (1.8 * colours[:-1, 0, 0, :2] - 0.9).astype(np.float32)
        episodes.append(Episode(images, actions, actions[:, 0], np.zeros(steps, bool)))
    return OfflineDataset.from_episodes(episodes)


def stacked() -> OfflineDataset:
    return coloured().stack_frames(3)


def batch_of(agent: Agent, seed: int = 0) -> tuple[Batch, Any]:
    return agent.sample(stacked(), BATCH, [torch.Generator().manual_seed(seed)])


# -- the encoder -------------------------------------------------------------------------------------------------------


def plain_encoding(encoder: ImpalaSmall, image: np.ndarray) -> np.ndarray:
    """One image's encoding by sums over windows, in the layout (height, width, channels)."""
    numbers = {name: p.detach().numpy() for name, p in encoder.named_parameters()}

    def convolved(x: np.ndarray, name: str) -> np.ndarray:
        weight, (height, width, _) = numbers[f"{name}.weight"], x.shape
        padded = np.pad(x, ((1, 1), (1, 1), (0, 0)))
        out = np.zeros((height, width, len(weight))) + numbers[f"{name}.bias"]
        for row in range(height):
            for column in range(width):
                out[row, column] += np.einsum("ijc,ocij->o", padded[row : row + 3, column : column + 3], weight)
        return out

    def pooled(x: np.ndarray) -> np.ndarray:
        """SAME in JAX: windows start at the even rows and columns, and end at the border."""
        halves = range(0, x.shape[0], 2), range(0, x.shape[1], 2)
        return np.array([[x[i : i + 3, j : j + 3].max((0, 1)) for j in halves[1]] for i in halves[0]])

    x = image / 255
    for i in range(3):
        x = pooled(convolved(x, f"stacks.{i}.enter"))
        x = x + convolved(np.maximum(convolved(np.maximum(x, 0), f"stacks.{i}.inner"), 0), f"stacks.{i}.outer")
    h = numbers["linear.weight"] @ np.maximum(x, 0).ravel() + numbers["linear.bias"]
    return 0.5 * h * (1 + np.tanh(np.sqrt(2 / np.pi) * (h + 0.044715 * h**3)))


def test_the_encoder_is_what_it_should_be() -> None:
    encoder = ImpalaSmall((16, 8, 9)).double()
    for p in encoder.parameters():
        torch.nn.init.normal_(p, std=0.2)
    images = torch.randint(0, 256, (2, 16, 8, 9), dtype=torch.uint8)
    expected = [plain_encoding(encoder, image) for image in images.double().numpy()]
    np.testing.assert_allclose(encoder(images).detach(), expected, rtol=1e-9, atol=1e-9)


def test_size_and_beginning_of_the_published_encoder() -> None:
    encoder = ImpalaSmall((64, 64, 9))
    channels = [(9, 16), (16, 16), (16, 16), (16, 32), (32, 32), (32, 32), (32, 32), (32, 32), (32, 32)]
    count = sum(9 * before * after + after for before, after in channels) + 8 * 8 * 32 * 512 + 512
    assert sum(p.numel() for p in encoder.parameters()) == count
    assert encoder(torch.zeros(2, 64, 64, 9, dtype=torch.uint8)).shape == (2, FEATURES)
    weight = encoder.stacks[0].enter.weight  # type: ignore[union-attr]
    bound = (6 / (9 * 9 + 9 * 16)) ** 0.5
    assert 0.95 * bound < weight.abs().max() <= bound
    assert not encoder.linear.bias.any()


def test_observations_that_do_not_fit() -> None:
    for shape in ((12, 8, 3), (8, 0, 3), (17,)):
        with pytest.raises(ValueError, match=r"multiples of 8, and the observations have shape"):
            ImpalaSmall(shape)
    with pytest.raises(ValueError, match="which need encoder='impala-small'"):
        make(encoder="none")


# -- data --------------------------------------------------------------------------------------------------------------


def test_frames_are_stacked_within_their_episode() -> None:
    """Frame k of the file is an image in colour k."""
    colours = np.arange(10, dtype=np.uint8).reshape(-1, 1, 1, 1) + np.zeros((1, 1, 2, 2), np.uint8)
    nothing = np.zeros((8, 1), np.float32)
    episodes = [
        Episode(images, nothing[:steps], nothing[:steps, 0], np.ones(steps))
        for images, steps in ((colours[:4], 3), (colours[4:], 5))
    ]
    single = OfflineDataset.from_episodes(episodes)
    dataset = single.stack_frames(3)
    assert dataset.observation_shape == (1, 2, 6)
    assert dataset.states is single.states
    batch = dataset.take(torch.arange(8))
    assert batch.observations.shape == (8, 1, 2, 6)
    assert (batch.observations[:, :, :, 0::2] == batch.observations[:, :1, :1, 0::2]).all()
    assert batch.observations[:, 0, 1, 1::2].tolist() == [
        *([0, 0, 0], [0, 0, 1], [0, 1, 2]),
        *([4, 4, 4], [4, 4, 5], [4, 5, 6], [5, 6, 7], [6, 7, 8]),
    ]
    assert batch.next_observations[:, 0, 0, 0::2].tolist() == [
        *([0, 0, 1], [0, 1, 2], [1, 2, 3]),
        *([4, 4, 5], [4, 5, 6], [5, 6, 7], [6, 7, 8], [7, 8, 9]),
    ]
    later = dataset.n_step(3, 0.9).take(torch.tensor([[0, 2], [3, 7]]))
    assert later.observations[..., 0, 0, ::2].tolist() == [[[0, 0, 0], [0, 1, 2]], [[4, 4, 4], [6, 7, 8]]]
    assert later.next_observations[..., 0, 0, ::2].tolist() == [[[1, 2, 3], [1, 2, 3]], [[5, 6, 7], [7, 8, 9]]]
    assert torch.equal(dataset.stack_frames(1).take(torch.arange(8)).observations, single.observations)


def test_images_stay_in_eight_bits_and_in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = np.random.default_rng(0).integers(0, 256, (12, *FRAME), np.uint8)
    np.savez(tmp_path / "images.npz", observations=images)
    file = mapped(tmp_path / "images.npz", "observations")
    episodes = [
        Episode(file[at : at + 6], np.zeros((5, 2), np.float32), np.zeros(5), np.ones(5, bool)) for at in (0, 6)
    ]
    absolute, seen = np.abs, []
    monkeypatch.setattr(np, "abs", lambda column: seen.append(column.dtype) or absolute(column))
    check_episodes(episodes)
    assert np.uint8 not in seen
    assert np.float32 in seen
    dataset = OfflineDataset.from_episodes(episodes).stack_frames(3).to("cpu")
    assert dataset.states.dtype == torch.uint8
    assert dataset.states.data_ptr() == file.ctypes.data
    batch = dataset.sample(4)
    assert batch.observations.dtype == batch.next_observations.dtype == torch.uint8
    assert batch.observations.shape == (4, *SHAPE)
    np.testing.assert_array_equal(dataset.states.numpy(), images)


def archive(folder: Path, images: np.ndarray | None = None, name: str = "some-v0.npz") -> Path:
    path = folder / name
    images = np.random.default_rng(1).integers(0, 256, (50, *FRAME), np.uint8) if images is None else images
    np.savez_compressed(path, observations=images, actions=np.zeros(3))
    return path


def test_an_array_is_unpacked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = archive(tmp_path)
    with np.load(path) as file:
        images = file["observations"]
    np.testing.assert_array_equal(mapped(path, "observations"), images)
    unpacked = tmp_path / "some-v0.observations.npy"
    assert unpacked.exists()
    monkeypatch.setattr("shutil.copyfileobj", lambda *a: pytest.fail("unpacked again"))
    again = mapped(path, "observations")
    np.testing.assert_array_equal(again, images)
    assert isinstance(again, np.memmap)
    assert not again.flags.writeable
    os.utime(path, (unpacked.stat().st_mtime + 5,) * 2)
    with pytest.raises(pytest.fail.Exception, match="unpacked again"):
        mapped(path, "observations")


def test_an_interrupted_unpacking_is_repaired(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, unpacked = archive(tmp_path), tmp_path / "some-v0.observations.npy"

    def full_disk(source: Any, target: Any, size: int) -> None:
        target.write(source.read(100))
        raise OSError("No space left on device")

    with monkeypatch.context() as broken:
        broken.setattr("shutil.copyfileobj", full_disk)
        with pytest.raises(OSError, match="No space left"):
            mapped(path, "observations")
    assert [p.name for p in tmp_path.iterdir() if not p.name.startswith(".")] == ["some-v0.npz"]
    unpacked.with_name(unpacked.name + ".partial").write_bytes(b"left by a process that was killed")
    first = np.array(mapped(path, "observations"))
    whole = unpacked.read_bytes()
    unpacked.write_bytes(whole[:-1])
    np.testing.assert_array_equal(mapped(path, "observations"), first)
    assert unpacked.read_bytes() == whole
    assert not list(tmp_path.glob("*.partial"))


def test_damaged_archives_are_refused(tmp_path: Path) -> None:
    path = archive(tmp_path)
    with pytest.raises(ValueError, match="lacks rewards"):
        mapped(path, "rewards")
    whole = bytearray(path.read_bytes())
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(zipfile.BadZipFile):
        mapped(path, "observations")
    whole[len(whole) // 2] ^= 1
    path.write_bytes(whole)
    with pytest.raises((zipfile.BadZipFile, zipfile.zlib.error)):  # type: ignore[attr-defined]
        mapped(path, "observations")
    assert [p.name for p in tmp_path.iterdir() if not p.name.startswith(".")] == ["some-v0.npz"]


# -- augmentation ------------------------------------------------------------------------------------------------------


def test_a_shift_is_a_crop_of_the_padded_image() -> None:
    images = torch.randint(0, 256, (49, *SHAPE), dtype=torch.uint8)
    offsets = torch.cartesian_prod(torch.arange(-3, 4), torch.arange(-3, 4))
    moved = shifted(images, offsets)
    assert moved.dtype == torch.uint8
    for image, (down, right), result in zip(images.numpy(), offsets.tolist(), moved.numpy()):
        padded = np.pad(image, ((3, 3), (3, 3), (0, 0)), mode="edge")
        np.testing.assert_array_equal(result, padded[3 + down : 11 + down, 3 + right : 11 + right])


def test_offsets_are_drawn_by_the_seed_for_whole_batches() -> None:
    agent = make("deflow", augment=0.3)
    drawn = [agent.draw(50, torch.Generator().manual_seed(seed)).shift for seed in range(300)]
    moved = torch.stack([shift for shift in drawn if shift.any()])
    assert 60 < len(moved) < 120, "three tenths of 300"
    assert moved.unique().tolist() == [-3, -2, -1, 0, 1, 2, 3]
    assert not torch.equal(moved[..., 0], moved[..., 1])
    assert (moved[0] != moved[0, :1]).any(), "each image has its own"
    assert torch.equal(drawn[7], agent.draw(50, torch.Generator().manual_seed(7)).shift)
    assert make(augment=0.0).draw(4).shift is None
    states = AGENTS["deflow"](AGENTS["deflow"].hyperparameters(augment=1.0), 5, 2)
    assert states.draw(4).shift is None


def test_observation_and_next_observation_move_together() -> None:
    agent = make(augment=1.0)
    batch, draws = batch_of(agent)
    batch = batch._replace(next_observations=batch.observations)
    agent.encoders["target_critic"].load_state_dict(agent.encoders["critic"].state_dict())
    encoded = agent.encode(batch, draws, ALL_PARTS)
    assert torch.equal(encoded.observations, encoded.next_observations)
    still = agent.encode(batch, draws._replace(shift=None), ALL_PARTS)
    assert not torch.allclose(encoded.observations, still.observations)


def test_no_branch_depends_on_what_is_drawn() -> None:
    """A CUDA graph can record only such updates; fake tensors have no values to branch on."""
    agent = make("deflow")
    with FakeTensorMode(allow_non_fake_inputs=True):
        draws = agent.draw(BATCH)
        assert shifted(torch.zeros(BATCH, *SHAPE, dtype=torch.uint8), draws.shift).shape == (BATCH, *SHAPE)


# -- updates -----------------------------------------------------------------------------------------------------------

NEXT = {"fidec": ["flow next", "actor next"], "deflow": ["flow next", "actor next"], "fql": ["actor next"]}
NOW = ["flow now", "actor now", "critic now"]
CALLS: list[tuple[Parts, list[str], bool]] = [
    (("flow",), ["flow now"], False),
    (("data_critic",), ["critic now", "target_critic next"], False),
    (("critic",), ["critic now", "target_critic next"], True),
    (("actor",), NOW, False),
    (("critic", "actor"), [*NOW, "target_critic next"], True),
    (ALL_PARTS, [*NOW, "target_critic next"], True),
]


@pytest.mark.parametrize(("parts", "wanted", "aims"), CALLS)
@pytest.mark.parametrize("name", AGENTS)
def test_each_network_encodes_a_batch_once(name: str, parts: Parts, wanted: list[str], aims: bool) -> None:
    agent, calls = make(name), Counter[str]()
    batch, draws = batch_of(agent)
    draws = draws._replace(shift=None)
    for network, encoder in agent.encoders.items():

        def count(_: Any, given: tuple[Tensor], __: Any, network: str = network) -> None:
            which = [now for now, images in (("now", batch.observations), ("next", batch.next_observations))
                     if images is given[0]]  # fmt: skip
            calls[f"{network} {which[0]}"] += 1

        encoder.register_forward_hook(count)
    seen = agent.backward(batch, draws, parts, log=True)
    assert calls == Counter([*wanted, *(NEXT[name] if aims else [])])
    assert seen["total_loss"].isfinite(), "an encoding was read that was not made"


@pytest.mark.parametrize("part", ["flow", "critic", "data_critic", "actor"])
@pytest.mark.parametrize(
    ("name", "changes"),
    [
        *((name, {}) for name in AGENTS),
        *(("fidec", {"metric": metric}) for metric in ("cross", "pullback", "isotropic")),
    ],
)
def test_each_loss_moves_its_own_encoder_alone(name: str, changes: dict[str, object], part: Any) -> None:
    agent = make(name, **changes)
    agent.backward(*batch_of(agent), (part,))
    network = part.removeprefix("data_")
    for at, p in agent.named_parameters():
        own = at.startswith((f"{network}.", f"encoders.{network}.")) or (part == "actor" and at == "log_alpha")
        assert (p.grad is not None and bool(p.grad.any())) == own, at


@pytest.mark.parametrize(
    ("name", "changes"),
    [*((name, {}) for name in AGENTS), *(("fidec", {"metric": metric}) for metric in ("cross", "pullback"))],
)
def test_losses_together_have_the_gradients_of_each(name: str, changes: dict[str, object]) -> None:
    """Encodings are shared; the Q term must not reach the critic's encoder, nor the penalty the flow's."""
    agent = make(name, **changes).double()
    batch, draws = batch_of(agent)
    agent.backward(batch, draws, ALL_PARTS)
    together = {at: p.grad.clone() for at, p in agent.named_parameters() if p.grad is not None}
    for part in ALL_PARTS:
        agent.backward(batch, draws, (part,))
        alone = {at: p.grad for at, p in agent.named_parameters() if p.grad is not None}
        assert any(at.startswith(f"encoders.{part}.") for at in alone)
        torch.testing.assert_close({at: together.pop(at) for at in alone}, alone, rtol=1e-9, atol=1e-12)
    assert not together


def test_no_penalty_moves_the_flows_encoder(monkeypatch: pytest.MonkeyPatch) -> None:
    agent = make("deflow")
    monkeypatch.setattr(agent, "penalty", lambda obs, displacement, *_: (obs.sum(-1) + displacement.sum(-1), {}))
    batch, draws = batch_of(agent)
    agent.backward(batch, draws, ("flow", "actor"))
    both = [p.grad for p in agent.encoder_parameters("flow")]
    agent.backward(batch, draws, ("flow",))
    assert all(torch.equal(ours, p.grad) for ours, p in zip(both, agent.encoder_parameters("flow")))


def test_encodings_are_in_their_place() -> None:
    agent = make()
    for p in agent.encoders["target_critic"].parameters():
        torch.nn.init.normal_(p, std=0.1)
    batch, draws = agent.sample(stacked(), BATCH, [torch.Generator().manual_seed(5)])
    assert draws.shift is not None
    images, following = shifted(batch.observations, draws.shift), shifted(batch.next_observations, draws.shift)
    encoded = agent.encode(batch, draws, ALL_PARTS)
    for network in NETWORKS:
        ahead = agent.encoders["target_critic" if network == "critic" else network]
        assert torch.equal(agent.view(network, encoded.observations), agent.encoders[network](images))
        assert torch.equal(agent.view(network, encoded.next_observations), ahead(following))
    assert encoded.observations.requires_grad
    assert not encoded.next_observations.requires_grad


def test_the_targets_encoder_follows_the_critics() -> None:
    agent = make(tau=0.25)
    for p in agent.encoders["target_critic"].parameters():
        torch.nn.init.normal_(p, std=0.1)
    target, source = ({k: v.clone() for k, v in agent.encoders[name].state_dict().items()}
                      for name in ("target_critic", "critic"))  # fmt: skip
    optimizer = agent.make_optimizer()
    agent.update(optimizer, *batch_of(agent), ("flow", "actor"))
    assert all(torch.equal(p, target[name]) for name, p in agent.encoders["target_critic"].state_dict().items())
    agent.update(optimizer, *batch_of(agent))
    for name, p in agent.encoders["target_critic"].state_dict().items():
        torch.testing.assert_close(p, 0.75 * target[name] + 0.25 * source[name])


def test_a_frozen_flow_keeps_its_encoder() -> None:
    agent = make(freeze_flow_after=0)
    optimizer, encoder = agent.make_optimizer(), agent.encoders["flow"]
    agent.update(optimizer, *batch_of(agent), ("flow",))
    before = [p.clone() for p in encoder.parameters()]
    agent.update(optimizer, *batch_of(agent), agent.agent_parts(0))
    assert all(map(torch.equal, before, encoder.parameters()))
    agent.update(optimizer, *batch_of(agent), ("frozen_flow", "actor"))
    assert not any(map(torch.equal, before, encoder.parameters())), "Adam's momentum, as in the published code"


@pytest.mark.parametrize("name", AGENTS)
def test_learns_what_images_tell(name: str) -> None:
    """Actions and rewards can be read from the colour alone."""
    hidden = {"actor_hidden": (64, 64), "critic_hidden": (64,)}
    agent = make(name, lr=1e-3, grad_clip=None, lagrange=False, alpha=10.0, flow_steps=5, **hidden)
    optimizer, generator, dataset = agent.make_optimizer(), torch.Generator().manual_seed(0), stacked()
    for _ in range(120):
        batch, draws = agent.sample(dataset, 32, [generator])
        agent.update(optimizer, batch, draws)
    batch = dataset.take(torch.arange(len(dataset)))
    seen = agent.observe(batch.observations)
    noise = torch.randn(len(seen), 2, generator=generator)
    spread = batch.actions.var(0).mean()
    assert (agent.flow_action(seen, noise) - batch.actions).square().mean() < 0.4 * spread
    assert (agent.act(seen, noise) - batch.actions).square().mean() < 0.6 * spread
    q = agent.critic(agent.view("critic", seen), batch.actions).mean(0)
    assert (q - batch.rewards).square().mean() < 0.1 * batch.rewards.var()


@pytest.mark.parametrize("name", AGENTS)
def test_seeds_together_are_seeds_alone(name: str) -> None:
    agents = [make(name, seed).double() for seed in (4, 0)]
    group = SeedGroup(agents)
    updates: list[Parts] = [("flow",), ("data_critic",), ALL_PARTS, ("critic", "frozen_flow", "actor")]
    optimizer, generators = group.make_optimizer(), [torch.Generator().manual_seed(seed) for seed in (4, 0)]
    for parts in updates:
        batch, draws = group.sample(stacked(), BATCH, generators)
        group.update(optimizer, batch, draws, parts)
    for seed, together in zip((4, 0), agents):
        alone = make(name, seed).double()
        optimizer, generator = alone.make_optimizer(), torch.Generator().manual_seed(seed)
        for parts in updates:
            alone.update(optimizer, *alone.sample(stacked(), BATCH, [generator]), parts)
        torch.testing.assert_close(dict(together.state_dict()), dict(alone.state_dict()), rtol=1e-9, atol=1e-12)


def test_compiled_losses_are_the_losses() -> None:
    torch.compiler.reset()
    plain, compiled = (make("deflow", flow_steps=1).double() for _ in range(2))
    compiled.compile(fullgraph=True, dynamic=False, backend="eager")
    for agent in (plain, compiled):
        agent.update(agent.make_optimizer(), *batch_of(agent))
    torch.testing.assert_close(dict(compiled.state_dict()), dict(plain.state_dict()), rtol=1e-9, atol=1e-12)


# -- acting, saving and playing ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["sample", "best-of-n", "mean-flow-of-n", "iterated"])
def test_acting_encodes_each_state_once(rule: Any) -> None:
    agent, rows, acting = make(), [], Acting(rule, 5)
    for encoder in agent.encoders.values():
        encoder.register_forward_hook(lambda _, given, __: rows.append(len(given[0])))
    images = stacked().take(torch.arange(3)).observations
    noise = acting.draw(agent, 3, torch.Generator().manual_seed(0))
    actions = acting(agent, agent.observe(images), noise)
    assert actions.shape == (3, 2)
    assert rows == [3, 3, 3]
    alone = acting(agent, agent.observe(images[1:2]), noise[1:2])
    torch.testing.assert_close(actions[1:2], alone, rtol=1e-4, atol=1e-5)


def test_a_player_stacks_frames_as_the_data_are(monkeypatch: pytest.MonkeyPatch) -> None:
    agent, seen = make(), []
    observe = agent.observe
    monkeypatch.setattr(agent, "observe", lambda obs: seen.append(obs) or observe(obs))
    dataset = stacked()
    act = Policy(agent)
    for i in range(5):
        act(dataset.states[i : i + 1].numpy())
    assert seen[0].dtype == torch.uint8
    assert torch.equal(torch.cat(seen), dataset.take(torch.arange(5)).observations)


@pytest.mark.parametrize("name", AGENTS)
def test_policies_and_checkpoints_hold_the_encoders(name: str, tmp_path: Path) -> None:
    agent, generator = make(name), torch.Generator().manual_seed(3)
    optimizer, dataset = agent.make_optimizer(), stacked()
    agent.update(optimizer, *agent.sample(dataset, BATCH, [generator]))
    path = save_checkpoint(tmp_path / "checkpoints", 1, agent, optimizer, generator, {})
    save_policy(RunConfig(VISUAL.name, agent=name, out=tmp_path, hyper=agent.config), agent)  # type: ignore[arg-type]
    loaded, image = load_policy(tmp_path / "policy.safetensors").network, dataset.take(torch.arange(2)).observations
    assert dataclasses.asdict(loaded.config).items() <= dataclasses.asdict(agent.config).items()
    assert torch.equal(
        loaded.act(loaded.observe(image), torch.ones(2, 2)), agent.act(agent.observe(image), torch.ones(2, 2))
    )

    resumed, later = make(name, seed=9), torch.Generator()
    its_optimizer = resumed.make_optimizer()
    read_checkpoint(path).restore(resumed, its_optimizer, later)
    agent.update(optimizer, *agent.sample(dataset, BATCH, [generator]))
    resumed.update(its_optimizer, *resumed.sample(dataset, BATCH, [later]))
    assert all(torch.equal(p, resumed.state_dict()[at]) for at, p in agent.state_dict().items())
    assert any(at.startswith("encoders.target_critic.") for at in agent.state_dict())


class Lamp(gym.Env):
    """The screen glows as the last action was; the reward is the red that was asked for."""

    observation_space = gym.spaces.Box(0, 255, FRAME, np.uint8)
    action_space = gym.spaces.Box(-1, 1, (2,), np.float32)

    def _screen(self, red: float) -> np.ndarray:
        return np.full(FRAME, int(127.5 * (1 + red)), np.uint8)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        super().reset(seed=seed)
        return self._screen(self.np_random.uniform(-1, 1)), {}

    def step(self, action: np.ndarray) -> Any:
        return self._screen(float(action[0])), float(action[0]), False, False, {}


LAMP = EnvSpec("lamp", "fdkernels/Lamp-v0", (), NormalizedReturn(0, 1))


def lamp_config(folder: Path, **changes: Any) -> RunConfig:
    hyper = AGENTS["fql"].hyperparameters(**SMALL)
    sizes = {"flow_warmup": 2, "critic_warmup": 2, "steps": 2, "eval_every": 2, "log_every": 1, "batch_size": 8}
    settings: dict[str, Any] = {**sizes, "eval_episodes": 2, "hyper": hyper, "agent": "fql", "out": folder, **changes}
    return RunConfig("lamp", **settings)


@pytest.mark.parametrize("num_seeds", [1, pytest.param(2, marks=pytest.mark.long("every curve is drawn twice"))])
def test_a_run_on_images(num_seeds: int, tmp_path: Path) -> None:
    gym.register(LAMP.env_id, lambda: Lamp(), max_episode_steps=5, disable_env_checker=True)
    try:
        trained = Run(lamp_config(tmp_path, num_seeds=num_seeds), LAMP, coloured(), torch.device("cpu"))
        for member in trained.members:
            member.config.folder.mkdir(exist_ok=True)
        trained.train()
        trained.finish()
    finally:
        gym.registry.pop(LAMP.env_id)
    for member in trained.members:
        assert [row["step"] for row in member.result.evaluations if row["role"] == "policy"] == [2, 4, 6]
        assert load_policy(member.config.folder / "policy.safetensors").network.config.frame_stack == 3


# -- settings ----------------------------------------------------------------------------------------------------------


def test_settings_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    images, states = coloured(), (17,)
    blind = dataclasses.replace(AGENTS["fql"].hyperparameters(**SMALL), encoder="none")
    with pytest.raises(RunError, match=r"images of shape \(8, 8, 3\), which need --encoder impala-small"):
        Run(lamp_config(tmp_path, hyper=blind), LAMP, images, torch.device("cpu"))
    with pytest.raises(RunError, match="--standardize-observations is for states"):
        Run(lamp_config(tmp_path, standardize_observations=True), LAMP, images, torch.device("cpu"))
    with pytest.raises(RunError, match="--online-steps is for states"):
        Run(lamp_config(tmp_path, online_steps=10), LAMP, images, torch.device("cpu"))
    for changes in ({"encoder": "impala-small"}, {"frame_stack": 2}, {"augment": 0.1}):
        config = lamp_config(tmp_path, hyper=AGENTS["fql"].hyperparameters(**changes))
        with pytest.raises(
            RunError, match="states of 17 numbers; --encoder, --frame-stack and --augment are for images"
        ):
            check_observations(config, states)
    check_observations(lamp_config(tmp_path, hyper=AGENTS["fql"].hyperparameters()), states)
    for bad in ({"augment": 1.5}, {"frame_stack": 0}):
        with pytest.raises(ValueError, match="must be"):
            AGENTS["fql"].hyperparameters(**bad)


@pytest.mark.parametrize("preset", ["quick", "standard", "full"])
@pytest.mark.parametrize("agent", AGENTS)
def test_every_preset_reads_images(preset: str, agent: str) -> None:
    for name in (VISUAL.name, "visual-puzzle-4x6-noisy-singletask-v0", "visual-cube-single-play-singletask-task1-v0"):
        config = preset_config(preset, agent, name)
        hyper = config.hyper
        assert (hyper.encoder, hyper.frame_stack, hyper.augment) == ("impala-small", 3, 0.5)
        assert not config.standardize_observations
        assert (config.steps <= 2_000) == (config.batch_size < 256) == (preset != "full")
        check_observations(config, (64, 64, 3))
    assert preset_config(preset, agent, "cube-single-play-singletask-task1-v0").hyper.encoder == "none"


@pytest.mark.parametrize(
    ("task", "alpha"),
    [("cube-single", 300), ("cube-double", 100), ("scene", 100), ("puzzle-3x3", 300), ("puzzle-4x4", 300)],
)
def test_published_settings_of_fql_on_images(task: str, alpha: float) -> None:
    name = f"visual-{task}-play-singletask-task1-v0"
    config = preset_config("full", "fql", name)
    assert (config.hyper.alpha, config.steps, config.batch_size) == (alpha, 500_000, 256)
    assert "2502.02538" in published.describe(name, "fql")
    assert "no published settings" in published.describe("visual-cube-triple-play-singletask-v0", "fql")


# -- OGBench -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def downloads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    pytest.importorskip("ogbench", reason="OGBench is an extra of this project")
    monkeypatch.setattr(ogbench, "FOLDER", tmp_path)
    monkeypatch.setattr(ogbench.constants, "HF_HUB_OFFLINE", True)
    return tmp_path


def visual_columns() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "observations": rng.integers(0, 256, (30, 64, 64, 3), np.uint8),
        "actions": rng.uniform(-1, 1, (30, 8)).astype(np.float32),
        "terminals": np.arange(30) % 10 == 9,
        "qpos": rng.uniform(0, 8, (30, 15)),
    }


def test_a_file_of_images(downloads: Path) -> None:
    columns = visual_columns()
    path = downloads / "visual-antmaze-medium-navigate-v0.npz"
    np.savez_compressed(path, **columns)
    dataset = load_dataset(VISUAL)
    assert dataset.states.dtype == torch.uint8
    np.testing.assert_array_equal(dataset.states.numpy(), columns["observations"])
    assert dataset.observation_shape == (64, 64, 3)
    assert len(dataset) == 27
    assert set(dataset.rewards.tolist()) <= {-1.0, 0.0}
    np.savez(path, **{**columns, "observations": columns["observations"].astype(np.float32)})
    with pytest.raises(DatasetUnavailable, match=r"float32 of shape .* not images of 8 bits"):
        load_dataset(VISUAL)
    np.savez(path, **{**columns, "observations": columns["observations"][:-1]})
    with pytest.raises(DatasetUnavailable, match="different lengths"):
        load_dataset(VISUAL)


def test_images_are_not_generated(downloads: Path) -> None:
    with pytest.raises(DatasetUnavailable) as error:
        load_dataset(VISUAL)
    assert "only states are generated" in str(error.value)
    assert "copy visual-antmaze-medium-navigate-v0.npz into" in str(error.value)
    with pytest.raises(scripted.CannotPlay, match="only states are generated"):
        scripted.recipe_of("visual-cube-single-play")


@pytest.mark.parametrize(("name", "value"), [("MUJOCO_GL", "osmesa"), ("DISPLAY", ":0"), ("unset", "")])
def test_rendering_needs_no_screen(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("MUJOCO_GL", "DISPLAY"):
        monkeypatch.setenv(variable, "")
    monkeypatch.setenv(name, value)
    reloaded: list[Any] = []
    monkeypatch.setattr("importlib.reload", reloaded.append)
    monkeypatch.setattr("sys.platform", "linux")
    render_off_screen()
    assert os.environ["MUJOCO_GL"] == {"MUJOCO_GL": "osmesa", "DISPLAY": "", "unset": "egl"}[name]
    assert [module.__name__.rpartition(".")[2] for module in reloaded] == (["gl_context"] if name == "unset" else [])


@pytest.mark.long("two scenes are compiled, and frames are rendered without a graphics card")
@pytest.mark.parametrize("name", [VISUAL.name, "visual-cube-single-play-singletask-task2-v0"])
def test_visual_environments(name: str) -> None:
    """Images of a seed are the same again, and the goal is that of the task with states."""
    pytest.importorskip("ogbench", reason="OGBench is an extra of this project")
    task = resolve(name).env_id.removeprefix("fdkernels/")
    env, states = ogbench.make(task), ogbench.make(task.removeprefix("visual-"))
    assert env.observation_space == gym.spaces.Box(0, 255, (64, 64, 3), np.uint8)
    action = np.full(env.action_space.shape, 0.5, np.float32)
    first, again = ([env.reset(seed=3)[0], env.step(action)[0]] for _ in range(2))
    np.testing.assert_array_equal(first, again)
    assert first[0].dtype == np.uint8
    assert env.observation_space.contains(first[1])
    assert first[0].std() > 5, "there is something to see"
    assert not np.array_equal(*first)
    ours, theirs = ({"qpos": np.random.default_rng(0).uniform(-0.3, 0.6, (500, 40))} for _ in range(2))
    from ogbench.relabel_utils import relabel_dataset

    relabel_dataset(task, env, ours)
    relabel_dataset(task, states, theirs)
    np.testing.assert_array_equal(ours["rewards"], theirs["rewards"])
    env.close()
    states.close()


@pytest.mark.long("a process of its own, with a scene to compile")
def test_a_process_that_has_rendered_can_import_triton() -> None:
    """As PyTorch does when an agent is first updated. Loaded after Mesa's LLVM, Triton's would end the process."""
    pytest.importorskip("ogbench", reason="OGBench is an extra of this project")
    pytest.importorskip("triton", reason="only Linux has it")
    code = "import sys, train.data.ogbench as o; assert 'triton' not in sys.modules\n"
    code += f"o.make({VISUAL.env_id.removeprefix('fdkernels/')!r}).reset(seed=0); import triton._C.libtriton"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.returncode == 0, done.stderr


@pytest.mark.long("a whole run in the simulator, which renders every frame")
def test_a_run_on_ogbenchs_images(downloads: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.savez_compressed(downloads / "visual-antmaze-medium-navigate-v0.npz", **visual_columns())
    gym.spec(VISUAL.env_id).max_episode_steps = 4
    small = (
        "--preset quick --actor-hidden 16 --critic-hidden 16 --flow-warmup 2 --critic-warmup 2 --steps 2 --batch-size 4"
    )
    arguments = [
        *small.split(),
        "--eval-every",
        "2",
        "--eval-episodes",
        "1",
        "--no-scale-rewards",
        "--out",
        str(tmp_path / "run"),
    ]
    film = [str(tmp_path / "run"), "--episodes", "1", "--record", str(tmp_path / "ant.gif"), "--seconds", "0.1"]
    try:
        assert run.main(["--env", VISUAL.name, "--device", "cpu", *arguments]) == 0
        assert play.main(film) == 0
    finally:
        gym.spec(VISUAL.env_id).max_episode_steps = None
        kept_vector_env.cache_clear()  # its episodes are that short
    assert "success rate" in capsys.readouterr().out
    assert (tmp_path / "ant.gif").exists()
