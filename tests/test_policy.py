"""Trained policies used without training: loading, acting, exporting. Bad files are in tests/test_untrusted.py."""

from __future__ import annotations

import dataclasses
import errno
import itertools
import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from fdkernels.policy import (
    Acting,
    DisplacementPolicy,
    FlowPolicy,
    NotFinite,
    OneStepPolicy,
    Policy,
    PolicyConfig,
    PolicyError,
    export_policy,
    load_policy,
    save_policy,
)
from fdkernels.policy.acting import REFINING_RULES, RULES
from fdkernels.policy.export import trace
from fdkernels.policy.network import KINDS
from train.agents import AGENTS
from train.outputs.policy import save_policy as save_run
from train.settings import RunConfig

ROOT = Path(__file__).parents[1]
OBS, ACTIONS, FRAMES = 11, 3, 2
FRAME = (8, 16, 3)
SMALL: dict[str, Any] = {"actor_hidden": (32, 32), "critic_hidden": (16,), "flow_steps": 2}
RULES_OF = [(kind, rule) for kind in KINDS for rule in RULES if KINDS[kind].refines or rule not in REFINING_RULES]


def network(kind: str = "displacement", images: bool = False, **changes: Any) -> FlowPolicy:
    """A network that has learned nothing, but standardises states."""
    torch.manual_seed(0)
    of_images: dict[str, Any] = {"encoder": "impala-small", "frame_stack": FRAMES} if images else {}
    shape = (*FRAME[:2], FRAMES * FRAME[2]) if images else OBS
    made = KINDS[kind](PolicyConfig(**{**SMALL, **of_images, **changes}), shape, ACTIONS)
    if not images:
        torch.nn.init.normal_(made.obs_mean)
        torch.nn.init.uniform_(made.obs_std, 0.5, 2)
    return made


def observations(*lead: int, images: bool = False, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (*lead, *FRAME), np.uint8) if images else rng.normal(size=(*lead, OBS))


def without(*packages: str) -> str:
    """Code after which these packages cannot be imported."""
    return f"import json, sys\nsys.modules.update(dict.fromkeys({packages!r}))\n"


def python(code: str, *arguments: object) -> Any:
    """What the code prints as JSON, in a process of its own."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


# -- loading -----------------------------------------------------------------------------------------------------------

OF_TRAINING = (
    *("gymnasium", "minari", "h5py", "mujoco", "tyro", "typeguard", "tensorboard", "matplotlib", "scipy", "ray"),
    *("tqdm", "filelock", "train"),
)


def test_three_lines_without_what_training_needs(tmp_path: Path) -> None:
    hyper = AGENTS["fidec"].hyperparameters(**SMALL)
    agent, file = AGENTS["fidec"](hyper, OBS, ACTIONS), tmp_path / "policy.safetensors"
    save_run(RunConfig("hopper-medium", out=tmp_path, hyper=hyper, acting="best-of-n"), agent)
    lines = """
        from fdkernels.policy import load_policy
        policy = load_policy(sys.argv[1], device="cpu")
        action = policy(np.zeros(11))
    """
    code = without(*OF_TRAINING, "triton", "onnx", "onnxscript") + "import numpy as np"
    code += textwrap.dedent(lines) + "print(json.dumps([action.tolist(), str(policy.acting), policy.env]))"
    action, acting, env = python(code, file)
    np.testing.assert_allclose(action, Policy(agent, Acting("best-of-n"))(np.zeros(OBS)), rtol=1e-4, atol=1e-6)
    assert (acting, env) == ("best-of-10", "hopper-medium")


@pytest.mark.parametrize("images", [False, True])
@pytest.mark.parametrize("name", AGENTS)
def test_it_acts_as_the_agent_did(name: str, images: bool, tmp_path: Path) -> None:
    wanted = network("one-step" if name == "fql" else "displacement", images)
    hyper = AGENTS[name].hyperparameters(**{n: getattr(wanted.config, n) for n in PolicyConfig.__dataclass_fields__})
    agent = AGENTS[name](hyper, tuple(wanted.obs_mean.shape), ACTIONS)
    agent.load_state_dict(wanted.state_dict(), strict=False)
    save_run(RunConfig("hopper-medium", agent=name, out=tmp_path, hyper=hyper, acting_samples=3), agent)
    obs = observations(4, images=images)
    for rule in RULES:
        if rule in REFINING_RULES and not agent.refines:
            continue
        policy, acting = load_policy(tmp_path / "policy.safetensors", acting=rule, seed=5), Acting(rule, 3)
        generator = torch.Generator().manual_seed(5)
        for _ in range(2):
            seen = agent.observe(torch.from_numpy(np.concatenate([obs] * FRAMES, -1) if images else obs))
            wanted_actions = acting(agent, seen, acting.draw(agent, 4, generator)).numpy()
            np.testing.assert_allclose(policy(obs), wanted_actions, rtol=1e-4, atol=1e-6, err_msg=rule)


def test_files_hold_what_acting_takes_and_old_ones_more(tmp_path: Path) -> None:
    hyper = AGENTS["fidec"].hyperparameters(**SMALL, encoder="impala-small")
    agent, file = AGENTS["fidec"](hyper, FRAME, ACTIONS), tmp_path / "policy.safetensors"
    save_run(RunConfig("hopper-medium", out=tmp_path, hyper=hyper), agent)
    weights, obs = load_file(file), observations(images=True)
    assert weights.keys() < agent.state_dict().keys()
    assert not [name for name in weights if "target" in name or "alpha" in name]
    with safe_open(file, framework="pt") as opened:
        header = opened.metadata()
    settings = json.loads(header.pop("networks"))
    assert settings.keys() == PolicyConfig.__dataclass_fields__.keys()
    before = load_policy(file)(obs)

    old = tmp_path / "old.safetensors"
    # the layout before had all settings of training, the one before that the weights too, and no kind of actor
    header["hyper"] = json.dumps(dataclasses.asdict(hyper) | {"gone": 1})
    save_file(weights, old, metadata=header)
    assert np.array_equal(load_policy(old)(obs), before)
    del header["actor"]
    save_file(agent.state_dict(), old, metadata=header)
    assert np.array_equal(load_policy(old)(obs), before)


@pytest.mark.parametrize("part", ["networks", "acting"])
def test_settings_of_newer_versions_are_refused(part: str, tmp_path: Path) -> None:
    file = tmp_path / "policy.safetensors"
    save_policy(Policy(network()), file)
    with safe_open(file, framework="pt") as opened:
        header = opened.metadata()
    header[part] = json.dumps(json.loads(header[part]) | {"boldness": 2.0})
    save_file(load_file(file), tmp_path / "newer", metadata=header)
    with pytest.raises(PolicyError, match=rf"newer is no policy .*{part} has settings .* not know: \['boldness'\]"):
        load_policy(tmp_path / "newer")


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    made = network("one-step", actor_layer_norm=True, critic_layer_norm=False)
    policy = Policy(made, Acting("mean-flow-of-n", np.int64(4), 0.1), seed=3, env="my arm")  # type: ignore[arg-type]
    save_policy(policy, tmp_path / "a", {"by": "me"})
    loaded, obs = load_policy(tmp_path / "a", seed=3), observations(5)
    assert (loaded.acting, loaded.env, loaded.network.config) == (policy.acting, policy.env, made.config)
    assert np.array_equal(loaded(obs), policy(obs))
    assert not any(p.requires_grad for p in loaded.network.parameters())
    # the file may change: the weights are no view of it
    (tmp_path / "a").write_bytes(b"\0" * (tmp_path / "a").stat().st_size)
    assert np.array_equal(loaded(obs), policy(obs))


def test_what_would_not_be_loaded_is_not_saved(tmp_path: Path) -> None:
    def refused(policy: Policy, message: str, notes: Any = None, error: type[Exception] = ValueError) -> None:
        with pytest.raises(error, match=message):
            save_policy(policy, file, notes)
        assert file.read_bytes() == before
        assert list(tmp_path.iterdir()) == [file]

    file = tmp_path / "a"
    save_policy(Policy(network()), file)
    before = file.read_bytes()
    refused(Policy(network(), env="x" * 201), "load_policy would refuse .* a name of 201 letters")
    refused(Policy(network(), env=3), "env and notes must be strings, got {'env': 3}", error=TypeError)  # type: ignore[arg-type]
    refused(Policy(network()), "env and notes must be strings, got {'by': None}", {"by": None}, TypeError)
    refused(Policy(network()), "has a header of", {"by": "x" * (33 << 20)})
    for name in ("env", "actor", "networks", "acting"):
        refused(Policy(network()), f"save_policy: notes must not have '{name}'", {"by": "me", name: "mine"})
    broken = network()
    torch.nn.init.constant_(broken.critic.weights[0], torch.nan)
    refused(Policy(broken), r"load_policy would refuse .*critic\.weights\.0 has NaN or infinity")
    mixed = network()
    mixed.critic.double()
    refused(Policy(mixed), r"policy must be in float32, got critic\.weights\.0 in torch\.float64")
    changed = Policy(network("one-step"))
    changed.acting = Acting("iterated")
    refused(changed, "load_policy would refuse .*'iterated' refines an action")


@pytest.mark.parametrize("write", [save_policy, export_policy])
def test_a_file_is_written_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Callable[[Policy, Path], None]
) -> None:
    file = tmp_path / "a.pt2"
    write(Policy(network()), file)
    before = file.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left on device: '.*/a\.pt2'"):
        write(Policy(network("one-step")), file)
    assert file.read_bytes() == before
    assert list(tmp_path.iterdir()) == [file]
    with pytest.raises(FileNotFoundError, match=r"nowhere/a\.pt2'"):
        write(Policy(network()), tmp_path / "nowhere" / "a.pt2")
    (tmp_path / "folder.pt2").mkdir()
    with pytest.raises(ValueError, match="is not a regular file"):
        write(Policy(network()), tmp_path / "folder.pt2")


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "a").touch()
    for path in (tmp_path / "b", tmp_path / "a" / "b"):
        with pytest.raises(PolicyError, match="is not there"):
            load_policy(path)
    with pytest.raises(PolicyError, match="cannot be read: File name too long"):
        load_policy(tmp_path / ("x" * 300))


@pytest.mark.parametrize(("observation", "settings"), [(5, {}), ((8, 16, 6), {"encoder": "impala-small"})])
def test_frames_that_observations_do_not_hold(observation: Any, settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"DisplacementPolicy: the config stacks 5 frames, and observations of shape"):
        DisplacementPolicy(PolicyConfig(**SMALL, frame_stack=5, **settings), observation, ACTIONS)


def test_missing_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = Policy(network())
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ImportError, match=r"an \.onnx needs onnxscript .*: pip install onnxscript"):
        export_policy(policy, tmp_path / "a.onnx")
    monkeypatch.setitem(sys.modules, "safetensors", None)
    for call in (lambda: load_policy(tmp_path / "a"), lambda: save_policy(policy, tmp_path / "a")):
        with pytest.raises(ImportError, match="needs safetensors: pip install safetensors"):
            call()


# -- acting ------------------------------------------------------------------------------------------------------------


def test_arrays_give_arrays_and_tensors_tensors() -> None:
    policy, obs = Policy(network(), "best-refined-of-n"), observations(4)

    def act(observation: Any) -> Any:
        policy.reset(0)
        return policy(observation)

    actions = act(obs)
    assert isinstance(actions, np.ndarray)
    assert (actions.shape, actions.dtype) == ((4, ACTIONS), np.float32)
    assert np.abs(actions).max() <= 1
    assert np.array_equal(act(obs.astype(np.float32)), actions)
    assert np.array_equal(act(np.repeat(obs, 2, axis=1)[:, ::2]), actions), "strides"
    for dtype in (torch.float64, torch.float32):
        of_tensor = act(torch.from_numpy(obs).to(dtype).requires_grad_())
        assert isinstance(of_tensor, Tensor)
        assert not of_tensor.requires_grad
        assert np.array_equal(of_tensor.numpy(), actions)
    assert np.array_equal(act(np.round(obs).astype(np.int16)), act(np.round(obs)))
    single = act(obs[0])
    assert single.shape == (ACTIONS,)
    np.testing.assert_allclose(single, act(obs[:1])[0])
    assert act(obs[:0]).shape == (0, ACTIONS)
    obs.setflags(write=False)
    assert np.array_equal(act(obs), actions)


def test_the_seed_decides() -> None:
    made, obs = network(), observations(3)
    first, same, other = Policy(made, seed=1), Policy(made, seed=1), Policy(made, seed=2)
    torch.manual_seed(0)
    calls = [first(obs) for _ in range(3)]
    torch.manual_seed(1)
    assert all(np.array_equal(call, same(obs)) for call in calls)
    assert not any(np.array_equal(a, b) for a, b in itertools.combinations([*calls, other(obs)], 2))
    first.reset(1)
    assert np.array_equal(first(obs), calls[0])
    first.reset()
    assert np.array_equal(first(obs), calls[1]), "without a seed the noise is drawn on"


def test_frames_are_remembered_until_reset() -> None:
    policy = Policy(network(images=True, flow_steps=1))
    film = observations(4, 3, images=True)  # four steps of three episodes

    def act(observation: np.ndarray) -> np.ndarray:
        policy._generator.manual_seed(0)
        return policy(observation)

    remembered = [act(screens) for screens in film]
    stacked = [act(np.concatenate(pair, axis=-1)) for pair in zip([film[0], *film], film)]
    assert all(map(np.array_equal, remembered, stacked))
    assert not np.array_equal(act(film[0]), remembered[0]), "it remembers the last frame"
    with pytest.raises(ValueError, match=r"observation has 2 rows, and the frame before had 3: call reset\(\)"):
        act(film[0, :2])
    policy.reset()
    assert np.array_equal(act(film[0]), remembered[0])
    policy.reset()
    np.testing.assert_allclose(act(film[0, 0]), remembered[0][0], rtol=1e-4, atol=1e-5)


def test_frames_are_remembered_as_they_were() -> None:
    """An environment may write each frame into the same memory."""
    reused, fresh = Policy(network(images=True, flow_steps=1)), Policy(network(images=True, flow_steps=1))
    buffer = torch.empty(FRAME, dtype=torch.uint8)
    for screen in torch.from_numpy(observations(4, images=True)):
        buffer.copy_(screen)
        assert torch.equal(reused(buffer), fresh(screen))


class Duck:
    shape, dtype, ndim = (OBS,), np.float32, 1


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (np.zeros(12), ValueError, r"observation must be \(11,\), or a batch of such observations, got \(12,\)"),
        (np.zeros((2, 2, 11)), ValueError, r"observation must be \(11,\), or a batch .*, got \(2, 2, 11\)"),
        (np.float64(0), TypeError, "observation must be an array or a tensor, got float64"),
        (np.zeros(()), ValueError, r"got \(\)"),
        ([0.0] * 11, TypeError, "observation must be an array or a tensor, got list"),
        (Duck(), TypeError, "observation must be an array or a tensor, got Duck"),
        (np.full(11, "a"), TypeError, "observation must hold real numbers, got <U1"),
        (np.zeros(11, complex), TypeError, "observation must hold real numbers, got complex128"),
        (torch.zeros(11, dtype=torch.complex64), TypeError, "observation must hold real numbers, got torch.complex64"),
        (torch.zeros(11, dtype=torch.bool), TypeError, "observation must hold real numbers, got torch.bool"),
        (np.where(np.arange(11) == 4, np.nan, 0.0), NotFinite, r"the observation has nan at \(4,\)"),
        (np.full((2, 11), [[0.0], [np.inf]]), NotFinite, r"the observation has inf at \(1, 0\)"),
        (torch.full((11,), torch.nan), NotFinite, r"the observation has nan at \(0,\)"),
        (np.full(11, 1e300), NotFinite, "the observation has inf"),
    ],
)
def test_bad_observations(given: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Policy(network())(given)


def test_bad_images() -> None:
    policy = Policy(network(images=True))
    with pytest.raises(TypeError, match=r"observation must be images in uint8, 0 to 255, got torch\.float32"):
        policy(np.zeros(FRAME, np.float32))
    with pytest.raises(ValueError, match=r"must be \(8, 16, 3\), or \(8, 16, 6\) with its 2 frames, or a batch"):
        policy(np.zeros((8, 16, 9), np.uint8))


def test_an_action_that_is_not_finite_is_not_returned() -> None:
    made = network("one-step")
    with torch.no_grad():
        made.actor[-1].weight.copy_(torch.tensor([3e38, -3e38]).repeat(16))
    with pytest.raises(NotFinite, match=r"the policy's action has nan at \(0, 0\)"):
        Policy(made)(np.full(OBS, 1e30))


@pytest.mark.parametrize("rule", ["best-of-n", "iterated", "best-flow-of-n", "mean-flow-of-n"])
def test_values_that_are_not_finite_choose_nothing(rule: Any) -> None:
    """The weights are finite, and the values overflow."""
    made = network(critic_layer_norm=False)
    with torch.no_grad():
        for weight in made.critic.weights:
            weight.copy_(torch.tensor([3e38, -3e38]).repeat(weight.shape[1])[: weight.shape[1], None])
    with pytest.raises(NotFinite, match=r"the critics' mean Q of states and actions has nan at \(0, 0\)"):
        Policy(made, rule)(observations())


def test_actions_of_no_value_have_equal_weights() -> None:
    made, obs, noise = network(), torch.randn(2, OBS), torch.randn(2, 6, ACTIONS)
    torch.nn.init.zeros_(made.critic.weights[-1])
    actions = made.flow_action(obs.unsqueeze(1).expand(-1, 6, -1), noise)
    torch.testing.assert_close(Acting("mean-flow-of-n", 6)(made, obs, noise), actions.mean(1))


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"acting": "iterated"}, ValueError, "acting='iterated' refines an action, and a one-step policy has nothing"),
        ({"acting": "best"}, ValueError, "Acting: rule must be one of 'sample', .*, got 'best'"),
        ({"acting": 3}, TypeError, "acting must be an Acting or the name of a rule, got 3"),
        ({"seed": -1}, ValueError, "seed must be an integer of at least 0, got -1"),
        ({"seed": 0.5}, ValueError, "seed must be an integer of at least 0, got 0.5"),
    ],
)
def test_bad_settings(settings: dict[str, Any], error: type[Exception], message: str, tmp_path: Path) -> None:
    policy = Policy(network("one-step"))
    save_policy(policy, tmp_path / "a")
    for call in (lambda: Policy(policy.network, **settings), lambda: load_policy(tmp_path / "a", **settings)):
        with pytest.raises(error, match=message):
            call()
    with pytest.raises(TypeError, match="network must be a FlowPolicy, got Linear"):
        Policy(torch.nn.Linear(1, 1))  # type: ignore[arg-type]


# -- exporting ---------------------------------------------------------------------------------------------------------


def exported(kind: str, rule: Any, images: bool = False) -> Policy:
    """Networks and rows so large that processors' own ways would be taken, if they were looked at."""
    sizes = {"actor_hidden": (128, 128), "critic_hidden": (128, 128)}
    return Policy(network(kind, images, **sizes), Acting(rule, 32, 0.5))


def given_and_wanted(policy: Policy, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    images = policy.network.obs_mean.ndim > 1
    obs = torch.from_numpy(observations(rows, images=images, seed=rows))
    obs = torch.cat([obs] * FRAMES, dim=-1) if images else obs.float()
    noise = policy.acting.draw(policy.network, rows, torch.Generator().manual_seed(rows))
    return obs, noise, policy.acting(policy.network, policy.network.observe(obs), noise)


def quick(*cases: Any) -> list[Any]:
    """All rules on states, and one of each kind on images; only these cases are quick."""
    on_images = [("displacement", "best-of-n", True), ("one-step", "mean-refined-of-n", True)]
    all_cases = [(kind, rule, False) for kind, rule in RULES_OF] + on_images
    slow = pytest.mark.long("each is traced anew")
    return [pytest.param(*case, marks=() if case in cases else slow) for case in all_cases]


OPERATORS = {"aten", "_operator"}
CHOICES = quick(("displacement", "best-of-n", False), ("one-step", "mean-refined-of-n", True))


@pytest.mark.parametrize(("kind", "rule", "images"), CHOICES)
def test_a_graph_of_pytorchs_own_operators(kind: str, rule: str, images: bool) -> None:
    policy = exported(kind, rule, images)
    program = trace(policy)
    called = {node.target for node in program.graph.nodes if node.op not in ("placeholder", "output")}
    assert {getattr(target, "namespace", target.__module__) for target in called} <= OPERATORS
    function = program.module()
    for rows in (1, 2, 7):
        obs, noise, wanted = given_and_wanted(policy, rows)
        torch.testing.assert_close(function(obs, noise), wanted, rtol=1e-4, atol=1e-5)


def test_pytorch_alone_runs_it(tmp_path: Path) -> None:
    policy = exported("displacement", "sample")
    export_policy(policy, tmp_path / "policy.pt2")
    obs, noise, wanted = given_and_wanted(policy, 5)
    torch.save((obs, noise), tmp_path / "given.pt")
    code = without("fdkernels", "fdkernels_ref", "train", "safetensors") + textwrap.dedent("""
        import torch
        function = torch.export.load(sys.argv[1]).module()
        print(json.dumps(function(*torch.load(sys.argv[2])).tolist()))
    """)
    found = python(code, tmp_path / "policy.pt2", tmp_path / "given.pt")
    torch.testing.assert_close(torch.tensor(found), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("kind", "rule", "images"), quick(("one-step", "best-refined-of-n", False)))
def test_onnx_gives_the_same(
    kind: str, rule: str, images: bool, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    policy, file = exported(kind, rule, images), tmp_path / "policy.onnx"
    export_policy(policy, file)
    assert capfd.readouterr() == ("", "")
    assert list(tmp_path.iterdir()) == [file]
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    shapes = {tensor.name: tensor.shape for tensor in (*session.get_inputs(), *session.get_outputs())}
    assert shapes == {
        "observation": ["batch", *policy.network.obs_mean.shape],
        "noise": ["batch", policy.acting.draws, ACTIONS],
        "action": ["batch", ACTIONS],
    }
    for rows in (1, 2, 7):
        obs, noise, wanted = given_and_wanted(policy, rows)
        (found,) = session.run(["action"], {"observation": obs.numpy(), "noise": noise.numpy()})
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)


def test_bad_exports(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"path must end in \.pt2 or \.onnx, got 'policy\.pt'"):
        export_policy(Policy(network()), tmp_path / "policy.pt")
    double = Policy(network().double())
    assert double(observations(2)).dtype == np.float64
    for write in (export_policy, save_policy):
        with pytest.raises(
            ValueError, match=rf"{write.__name__}: policy must be in float32, got obs_mean in torch\.float64"
        ):
            write(double, tmp_path / "policy.pt2")


def test_exporting_leaves_the_policy_as_it_is(tmp_path: Path) -> None:
    agent = AGENTS["deflow"](AGENTS["deflow"].hyperparameters(**SMALL), OBS, ACTIONS)
    policy, other = Policy(agent), Policy(agent)
    policy(observations(2))
    other(observations(2))
    export_policy(policy, tmp_path / "policy.pt2")
    assert np.array_equal(policy(observations(2)), other(observations(2)))
    assert all(p.requires_grad for p in agent.actor.parameters())
    assert isinstance(agent, DisplacementPolicy)
    assert not isinstance(agent, OneStepPolicy)
