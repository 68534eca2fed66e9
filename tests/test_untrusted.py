"""Policies, checkpoints, results and folders of runs that a stranger made: nothing executes, escapes or allocates.

Their datasets are in tests/test_untrusted_data.py.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save, save_file

import train.run
from benchmarks.results import ResultError, load, write
from fdkernels.kernels.tuning import table
from fdkernels.policy import PolicyConfig, PolicyError, load_policy
from tests.strangers import FILES, damaged, little_memory
from train import play
from train.agents import AGENTS
from train.data.replay import Replay
from train.data.synthetic import random_dataset
from train.environments import resolve
from train.member import Member
from train.outputs import checkpoint, curve
from train.outputs.checkpoint import DamagedCheckpoint, read_checkpoint, save_checkpoint
from train.outputs.diverged import agent_without_memory
from train.outputs.files import write_whole
from train.outputs.folder import check_folder, prepare_folder
from train.outputs.policy import save_policy
from train.outputs.record import Record
from train.outputs.result import Result
from train.settings import RunConfig, RunError

SMALL: dict[str, Any] = {"actor_hidden": (8,), "critic_hidden": (8,), "flow_steps": 2}
OBS, ACTIONS = 11, 3  # Hopper's
NESTED = "[" * 100_000
HUGE = 10**12


# -- policies ----------------------------------------------------------------------------------------------------------


def policy(folder: Path) -> Path:
    """The file of a policy that plays."""
    folder.mkdir()
    hyper = AGENTS["fidec"].hyperparameters(**SMALL)
    config = RunConfig("hopper-medium", out=folder, hyper=hyper, acting="mean-flow-of-n", acting_samples=2)
    save_policy(config, AGENTS["fidec"](hyper, OBS, ACTIONS))
    return folder / "policy.safetensors"


def header_of(file: Path) -> dict[str, Any]:
    content = file.read_bytes()
    return json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])


def put_header(file: Path, header: bytes, length: int | None = None) -> None:
    content = file.read_bytes()
    rest = content[8 + int.from_bytes(content[:8], "little") :]
    file.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header + rest)


def edited(edit: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    """Change the header in place; the tensors stay where they are."""

    def apply(file: Path) -> None:
        header = header_of(file)
        edit(header)
        put_header(file, json.dumps(header).encode())

    return apply


def noted(name: str, value: str) -> Callable[[Path], None]:
    return edited(lambda header: header["__metadata__"].__setitem__(name, value))


def networks(**changes: Any) -> Callable[[Path], None]:
    def edit(header: dict[str, Any]) -> None:
        notes = header["__metadata__"]
        notes["networks"] = json.dumps(json.loads(notes["networks"]) | changes)

    return edited(edit)


def acting(**changes: Any) -> Callable[[Path], None]:
    def edit(header: dict[str, Any]) -> None:
        notes = header["__metadata__"]
        notes["acting"] = json.dumps(json.loads(notes["acting"]) | changes)

    return edited(edit)


def weighed(edit: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def apply(file: Path) -> None:
        weights = {name: tensor.clone() for name, tensor in load_file(file).items()}
        edit(weights)
        save_file(weights, file, metadata=header_of(file)["__metadata__"])

    return apply


def overflowing(weights: dict[str, torch.Tensor]) -> None:
    """Infinity minus infinity in the velocity, in whatever order it is summed."""
    weights["flow.net.0.weight"].zero_()
    weights["flow.net.0.bias"].fill_(3e38)
    weights["flow.net.2.weight"].fill_(3e38)
    weights["flow.net.2.weight"][:, ::2] = -3e38


def offsets(begin: int, end: int) -> Callable[[Path], None]:
    return edited(lambda header: header["obs_std"].update(data_offsets=[begin, end]))


def twice(file: Path) -> None:
    """The header names a tensor twice, with different offsets."""
    text = json.dumps(header_of(file))
    put_header(file, (text[:-1] + ', "obs_std": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}').encode())


POLICIES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "empty": (lambda file: file.write_bytes(b""), "policy of this version"),
    "header of 16 EiB": (lambda file: put_header(file, b"{}", 2**64 - 1), "has a header of 18,446,744,073,709,551,615"),
    "header longer than the file": (lambda file: put_header(file, b"{}", 90_000_000), "has a header of 90,000,000"),
    "header of 40 MB": (noted("pad", "x" * 40_000_000), r"has a header of 40,\d+,\d+ bytes"),
    "offsets behind the end": (offsets(0, HUGE), "SafetensorError"),
    "offsets backwards": (offsets(8, 0), "SafetensorError"),
    "offsets of another tensor": (offsets(0, 44), "SafetensorError"),
    "a tensor named twice": (twice, "SafetensorError"),
    "a shape that overflows": (
        edited(lambda header: header["obs_std"].update(shape=[2**40, 2**40])),
        "SafetensorError",
    ),
    "no notes": (edited(lambda header: header.pop("__metadata__")), "KeyError"),
    "notes nested in the header": (edited(lambda header: header["__metadata__"].update(env=[])), "SafetensorError"),
    "nested settings": (noted("networks", NESTED), "JSON is nested too deeply"),
    "settings 100 levels deep": (noted("networks", "[" * 100 + "]" * 100), "nested more than 20 levels"),
    "17 MB of settings": (noted("networks", "[" + "0," * 9_000_000 + "0]"), "JSON has more than 16 MiB"),
    "a number of 10,000 digits": (noted("networks", '{"flow_steps": ' + "1" * 10_000 + "}"), "ValueError.*digit"),
    "settings in a list": (noted("networks", "[]"), "networks is a list"),
    "layers a billion wide": (networks(actor_hidden=[10**9]), "at most 1048576, got 1000000000"),
    "layers of 3 GB": (networks(actor_hidden=[30_000] * 2), "lacks|would fit"),
    "critics of 7 GB": (networks(critic_hidden=[30_000] * 2), "lacks|would fit"),
    "critics a billion wide": (networks(critic_hidden=[10**9, 10**9]), "no policy of this version"),
    "a million layers": (networks(actor_hidden=[1] * 1_000_000), "actor_hidden must have at most 1024 layers"),
    "a thousand layers": (networks(actor_hidden=[1] * 1_000), "more layers than there are weights"),
    "layers of negative width": (networks(critic_hidden=[-1]), "critic_hidden must be an integer .*, got -1"),
    "widths in words": (networks(actor_hidden=["wide"]), "actor_hidden"),
    "flow steps for ever": (networks(flow_steps=10**15), "flow_steps must be at most 10000"),
    "flow steps in words": (networks(flow_steps="10"), "flow_steps must be an integer of at least 1, got '10'"),
    "half a flow step": (networks(flow_steps=0.5), "flow_steps must be an integer of at least 1, got 0.5"),
    "a trillion frames": (networks(frame_stack=HUGE), "frame_stack must be at most 65536"),
    "frames of a state": (networks(frame_stack=11), "stacks 11 frames"),
    "an encoder of states": (networks(encoder="impala-small"), "no policy of this version"),
    "a setting of no network": (networks(alhpa=1), "networks has settings that this version does not know: .*alhpa"),
    "an unknown encoder": (networks(encoder="os:system"), "encoder"),
    "a trillion samples": (acting(num_samples=HUGE), "num_samples must be at most 10000"),
    "samples in words": (acting(num_samples="10"), "num_samples must be an integer of at least 1"),
    "a temperature of NaN": (acting(temperature=float("nan")), "temperature must be finite and > 0, got nan"),
    "an unknown rule": (acting(rule="__class__"), "rule"),
    "a setting of no rule": (acting(run="rm"), "acting has settings that this version does not know: .*run"),
    "a rule for others": (
        edited(lambda header: header["__metadata__"].update(actor="one-step", acting='{"rule": "iterated"}')),
        "'iterated' refines an action, and a one-step policy has nothing",
    ),
    "an unknown kind": (noted("actor", "os"), "KeyError: 'os'"),
    "an unknown agent": (
        edited(lambda header: header["__metadata__"].update(agent="os") or header["__metadata__"].pop("actor")),
        "KeyError: 'os'",
    ),
    "an unknown environment": (noted("env", "os:system"), "unknown environment 'os:system'"),
    "an environment with a long name": (noted("env", "x" * 1_000_000), "a name of 1,000,000 letters"),
    "another environment": (
        noted("env", "halfcheetah-medium"),
        r"for observations \(11,\) and actions \(3,\).*\(17,\)",
    ),
    "NaN in a weight": (
        weighed(lambda weights: weights["critic.weights.0"][0, 0].fill_(torch.nan)),
        "critic.weights.0 has NaN or infinity",
    ),
    "weights that overflow": (
        weighed(overflowing),
        "the policy's action has nan",
    ),
    "weights of another width": (
        weighed(lambda weights: weights.update({"actor.0.weight": torch.zeros(8, 5)})),
        r"actor.0.weight is \(8, 5\)",
    ),
    "weights of another type": (
        weighed(lambda weights: weights.update({"actor.0.weight": torch.zeros(8, 14, dtype=torch.int64)})),
        "torch.int64, and",
    ),
    "one weight more": (weighed(lambda weights: weights.update(more=torch.zeros(1))), "should not have more"),
    "one weight less": (weighed(lambda weights: weights.pop("obs_std")), "lacks obs_std"),
    "no dimensions": (weighed(lambda weights: weights.update(obs_mean=torch.zeros(()))), "IndexError"),
    "flat critics": (
        weighed(lambda weights: weights.update({"critic.weights.0": torch.zeros(4)})),
        "IndexError",
    ),
}


def test_the_policy_that_is_altered_plays(tmp_path: Path) -> None:
    file = policy(tmp_path / "run")
    with little_memory():
        assert play.main([str(file.parent), "--episodes", "1"]) == 0


@pytest.mark.parametrize("attack", POLICIES)
def test_policies(tmp_path: Path, capsys: pytest.CaptureFixture[str], attack: str) -> None:
    file = policy(tmp_path / "run")
    arguments = [str(file.parent), "--episodes", "1"]
    make, message = POLICIES[attack]
    make(file)
    with little_memory():
        assert play.main(arguments) == 2
    printed = capsys.readouterr().err
    assert re.search(message, printed), printed
    assert printed.startswith("error: ")
    assert str(file.parent) in printed
    assert len(printed) < 1_500
    assert "memory" not in printed.lower(), "it was tried"


def test_settings_of_training_in_older_files_are_not_looked_at(tmp_path: Path) -> None:
    file = policy(tmp_path / "run")
    networks(lr=float("nan"), alpha=10**400, run="rm")(file)
    edited(lambda header: header["__metadata__"].update(hyper=header["__metadata__"].pop("networks")))(file)
    assert load_policy(file).network.config == PolicyConfig(**SMALL)


@pytest.mark.parametrize("files", FILES)
def test_policies_at_random(tmp_path: Path, files: int) -> None:
    file = policy(tmp_path / "run")
    refused = damaged(file, lambda: load_policy(file), PolicyError, files, reach=3_000)
    assert 0 < refused <= files


# -- the agents of states that went wrong, which have all settings -----------------------------------------------------

SETTINGS: dict[str, tuple[Any, str]] = {
    "a list": ([], "FiDecConfig is a list"),
    "a rate that is NaN": ({"lr": float("nan")}, "--lr must be finite"),
    "a weight beyond floats": ({"alpha": 10**400}, "too large to convert"),
    "a setting of no agent": ({"run": "rm"}, "unexpected keyword argument"),
    "flow steps in words": ({"flow_steps": "10"}, "flow_steps: str is not an instance of int"),
    "a million layers": ({"actor_hidden": [1] * 1_000_000}, "actor_hidden has 1,000,000 items"),
    "a thousand layers": ({"actor_hidden": [1] * 1_000}, "more layers than there are weights"),
    "frames of a state": ({"frame_stack": 11}, "stacks 11 frames"),
}


@pytest.mark.parametrize("attack", SETTINGS)
def test_settings_of_agents(attack: str) -> None:
    changes, message = SETTINGS[attack]
    weights = AGENTS["fidec"](AGENTS["fidec"].hyperparameters(**SMALL), OBS, ACTIONS).state_dict()
    hyper = {**SMALL, **changes} if isinstance(changes, dict) else changes
    assert agent_without_memory("fidec", SMALL, weights).obs_mean.is_meta
    with little_memory(), pytest.raises((TypeError, ValueError, OverflowError), match=message):
        agent_without_memory("fidec", hyper, weights)


# -- checkpoints -------------------------------------------------------------------------------------------------------


def member(folder: Path) -> Member:
    """What a run restores a checkpoint into."""
    config = RunConfig("hopper-medium", out=folder, hyper=AGENTS["fidec"].hyperparameters(**SMALL), num_seeds=1)
    agent = AGENTS["fidec"](config.hyper, OBS, ACTIONS)
    result = Result(config, resolve("hopper-medium"), random_dataset(40, OBS, ACTIONS))
    return Member(result, agent, agent.make_optimizer(), torch.Generator().manual_seed(0))


def evaluation(role: str, **changes: Any) -> dict[str, Any]:
    numbers = dict.fromkeys(("return_mean", "return_sem", "score_mean", "score_sem"), 1.5)
    return {"step": 4, "role": role, **numbers, "episodes": 2, **changes}


def saved(folder: Path, changes: dict[str, Any], edit: Callable[[dict[str, torch.Tensor]], Any]) -> Path:
    """A checkpoint at step 4, altered, with the checksum of what it holds: a stranger can compute it too."""
    whole = member(folder)
    rows = [evaluation(role) for role in ("policy", "sample", "flow")]
    notes = {"data": whole.result.data_identity, "evaluations": rows, "seconds": 3.0, **changes}
    path = save_checkpoint(folder / "checkpoints", 4, whole.agent, whole.optimizer, whole.generator, notes)
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    edit(tensors)
    path.write_bytes(save(tensors, metadata=sealed(tensors, header_of(path)["__metadata__"])))
    return path


def sealed(tensors: dict[str, torch.Tensor], header: dict[str, str]) -> dict[str, str]:
    """The header with the checksum of these tensors."""
    header = {name: text for name, text in header.items() if name != "checksum"}
    return {**header, "checksum": checkpoint._checksum(tensors, header)}


NOTES: dict[str, tuple[dict[str, Any], str]] = {
    "seconds in words": ({"seconds": "3"}, "'seconds' of dict is neither float"),
    "seconds of NaN": ({"seconds": float("nan")}, "took nan seconds"),
    "evaluations in words": ({"evaluations": "none"}, "'evaluations' of dict is not a list"),
    "an evaluation without a score": ({"evaluations": [{"step": 4, "role": "policy"}]}, "missing required key"),
    "an evaluation of another role": ({"evaluations": [evaluation("__class__")] * 3}, "evaluation 0 is of '__class__'"),
    "an evaluation to come": (
        {"evaluations": [evaluation(role, step=HUGE) for role in ("policy", "sample", "flow")]},
        "step 1000000000000",
    ),
    "an evaluation of one role": ({"evaluations": [evaluation("policy")]}, "1 evaluations, not one for each"),
    "a score in words": (
        {"evaluations": [evaluation(role, score_mean="best") for role in ("policy", "sample", "flow")]},
        "'score_mean' of item 0 .* is neither float",
    ),
    "other data": ({"data": {"ids": ["x" * 10_000]}}, "other data"),
    "online episodes in words": (
        {"online": {"episodes": "1", "steps": 0, "ended": []}},
        "'episodes' of dict is not an instance of int",
    ),
    "a step of no episode": ({"online": {"episodes": 1, "steps": -1, "ended": []}}, "-1 steps"),
    "returns in threes": ({"online": {"episodes": 1, "steps": 0, "ended": [[1.0, 0.0, 0.0]]}}, "1 online episodes"),
}


@pytest.mark.parametrize("attack", NOTES)
def test_notes_of_checkpoints(tmp_path: Path, attack: str) -> None:
    changes, message = NOTES[attack]
    path = saved(tmp_path, changes, lambda tensors: None)
    with pytest.raises(RunError, match=message) as error:
        member(tmp_path).restore(read_checkpoint(path))
    assert str(path) in str(error.value)
    assert len(str(error.value)) < 1_000


def moved(name: str, to: str) -> Callable[[dict[str, torch.Tensor]], Any]:
    return lambda tensors: tensors.update({to: tensors.pop(name)})


TENSORS: dict[str, tuple[Callable[[dict[str, torch.Tensor]], Any], str]] = {
    "Adam's state of no parameter": (moved("adam/0/exp_avg", "adam/999/exp_avg"), "lacks 0/exp_avg"),
    "Adam's state counted from the end": (moved("adam/0/exp_avg", "adam/-1/exp_avg"), "should not have -1/exp_avg"),
    "Adam's state in words": (moved("adam/0/exp_avg", "adam/x/y"), "lacks 0/exp_avg"),
    "one moment for all": (lambda t: t.update({"adam/0/exp_avg": torch.zeros(1)}), r"0/exp_avg is \(1,\)"),
    "a weight less": (lambda t: t.pop("agent/flow.net.0.weight"), "lacks flow.net.0.weight"),
    "a weight of another shape": (lambda t: t.update({"agent/obs_mean": torch.zeros(HUGE // HUGE)}), r"is \(1,\)"),
    "weights in whole numbers": (
        lambda t: t.update({"agent/obs_mean": torch.zeros(OBS, dtype=torch.int64)}),
        "torch.int64",
    ),
    "no generator": (lambda t: t.pop("generator"), "lacks generator"),
    "a short generator": (lambda t: t.update(generator=torch.zeros(3, dtype=torch.uint8)), r"generator is \(3,\)"),
    "a generator at no place": (lambda t: t["generator"].fill_(255), "generator cannot be restored"),
}


@pytest.mark.parametrize("attack", TENSORS)
def test_tensors_of_checkpoints(tmp_path: Path, attack: str) -> None:
    edit, message = TENSORS[attack]
    path = saved(tmp_path, {}, edit)
    into = member(tmp_path)
    before = {name: tensor.clone() for name, tensor in into.agent.state_dict().items()}
    with pytest.raises(RunError, match=message) as error:
        into.restore(read_checkpoint(path))
    assert str(path) in str(error.value)
    assert all(torch.equal(tensor, before[name]) for name, tensor in into.agent.state_dict().items())


def test_checkpoints_that_are_none(tmp_path: Path) -> None:
    path = saved(tmp_path, {}, lambda tensors: None)
    member(tmp_path).restore(read_checkpoint(path))
    whole = path.read_bytes()
    for make, message in (
        (lambda: put_header(path, b"{}", 2**63), "has a header of"),
        (lambda: noted("notes", NESTED)(path), "checksum"),
        (lambda: noted("step", "-1")(path), "checksum"),
        (lambda: (path.unlink(), os.mkfifo(path)), "not a regular file"),
    ):
        path.unlink()
        path.write_bytes(whole)
        make()
        with little_memory(), pytest.raises(DamagedCheckpoint, match=message):
            read_checkpoint(path)


def test_a_run_is_not_resumed_from_a_strangers_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(train.run, "load_dataset", lambda *a, **k: random_dataset(40, OBS, ACTIONS))
    tiny = "--env hopper-medium --preset quick --device cpu --actor-hidden 8 --critic-hidden 8 --flow-warmup 2"
    tiny += " --critic-warmup 2 --steps 2 --eval-every 2 --eval-episodes 1 --checkpoint-every 2 --flow-steps 2"
    command = [*tiny.split(), "--out", str(tmp_path / "run")]
    assert train.run.main(command) == 0
    path = max((tmp_path / "run" / "checkpoints").iterdir())
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    header = header_of(path)["__metadata__"]
    tensors["adam/-1/exp_avg"] = tensors.pop("adam/0/exp_avg")
    path.write_bytes(save(tensors, metadata=sealed(tensors, header)))
    assert train.run.main([*command, "--resume"]) == 2
    assert re.search(rf"error: --resume: {path} is not of this run: it should not have", capsys.readouterr().err)


def replay(tensors: dict[str, torch.Tensor] | None = None, **changes: torch.Tensor) -> Replay:
    """A replay of two episodes, of two and three steps, or of what is given."""
    made = Replay(random_dataset(40, 2, 1), capacity=6)
    if tensors is not None:
        made.restore({**tensors, **changes})
        return made
    for steps in (2, 3):
        made.begin(torch.zeros(2))
        for _ in range(steps):
            made.add(torch.zeros(1), torch.tensor(1.0), 1.0, torch.ones(2))
    return made


def rows(*numbers: int) -> torch.Tensor:
    return torch.tensor(numbers)


REPLAYS: dict[str, tuple[dict[str, torch.Tensor], str]] = {
    "more than there is room for": (
        {name: torch.zeros(7, dtype=torch.int64) for name in ("rows", "next_rows", "next_steps")}
        | {"actions": torch.zeros(7, 1), "rewards": torch.zeros(7), "masks": torch.zeros(7)},
        "at most 6",
    ),
    "wider states": ({"states": torch.zeros(7, 3)}, "would fit"),
    "states in double precision": ({"states": torch.zeros(7, 2, dtype=torch.float64)}, "would fit"),
    "no dimensions": ({"rows": torch.tensor(0)}, "would fit"),
    "columns of different lengths": ({"rewards": torch.zeros(4)}, "would fit"),
    "NaN": ({"rewards": torch.full((5,), torch.nan)}, "NaN or infinity in rewards"),
    "rows of other memory": ({"rows": rows(0, 1, 3, 4, HUGE)}, "rows outside 0 to 6"),
    "negative rows": ({"next_rows": rows(1, 2, 4, 5, -6)}, "next_rows outside 1 to 6"),
    "an action of no step": ({"next_steps": rows(1, 1, 3, 4, 5)}, "next_steps outside 0 to 4"),
    "rows out of order": ({"rows": rows(0, 1, 3, 4, 4)}, "not one episode after the other"),
    "another table": ({"__class__": torch.zeros(1)}, "should not have __class__"),
}


@pytest.mark.parametrize("attack", REPLAYS)
def test_replays_of_checkpoints(attack: str) -> None:
    good = {name: tensor.clone() for name, tensor in replay().tensors().items()}
    assert torch.equal(replay(good).last(3)[0], replay().last(3)[0])
    changes, message = REPLAYS[attack]
    with pytest.raises(ValueError, match=message):
        replay(good, **changes)
    with pytest.raises(ValueError, match="the episode under way has 3 steps, not 5"):
        replay(good).last(5)


# -- folders of runs ---------------------------------------------------------------------------------------------------


def run_folder(tmp_path: Path) -> tuple[RunConfig, Path]:
    """A folder of a run, and its settings. Beside it is a file that is the user's."""
    folder = tmp_path / "run"
    config = RunConfig("hopper-medium", out=folder, hyper=AGENTS["fidec"].hyperparameters(**SMALL))
    prepare_folder(folder, config)
    mine = tmp_path / "mine"
    (mine / "step-1.safetensors").parent.mkdir()
    (mine / "step-1.safetensors").write_text("mine")
    return config, mine


LEADING_OUT = ("checkpoints", "tensorboard", "curve.png", "metrics.csv", "trace.json", "policy.safetensors")


@pytest.mark.parametrize("name", LEADING_OUT)
@pytest.mark.parametrize("how", ["resume", "overwrite"])
def test_links_out_of_the_folder_of_a_run(tmp_path: Path, name: str, how: str) -> None:
    config, mine = run_folder(tmp_path)
    config = dataclasses.replace(config, **{how: True})  # type: ignore[arg-type]
    check_folder(config.folder, config)
    (config.folder / name).symlink_to(mine if "." not in name else mine / "step-1.safetensors")
    with pytest.raises(RunError, match=rf"{name} is a symbolic link"):
        check_folder(config.folder, config)
    assert (mine / "step-1.safetensors").read_text() == "mine"


def test_a_file_that_is_written_follows_no_link(tmp_path: Path) -> None:
    _, mine = run_folder(tmp_path)
    victim, path = mine / "step-1.safetensors", tmp_path / "new.json"
    path.with_name("new.json.partial").symlink_to(victim)
    write_whole(path, "content")
    assert (path.read_text(), path.is_symlink()) == ("content", False)
    path.unlink()
    path.symlink_to(victim)
    write_whole(path, "content")
    picture = tmp_path / "compare.png"
    picture.symlink_to(victim)
    curve.draw_comparison(picture, "", {"fql": (1.0, (0.0, 2.0), [1.0])}, 1.0, "score")
    assert picture.read_bytes().startswith(b"\x89PNG")
    for name, writes in (
        ("configs.json", lambda path: table.write(path, "sm_90", {})),
        ("bench.json", lambda path: write(path, {})),
    ):
        (tmp_path / name).with_suffix(".new").symlink_to(victim)
        (tmp_path / f".{name}.partial").symlink_to(victim)
        writes(tmp_path / name)
        assert (tmp_path / name).read_text().startswith("{")
    assert victim.read_text() == "mine"


CONFIGS: dict[str, str] = {
    "nested": NESTED,
    "100 levels deep": '{"hyper": ' + '{"a": ' * 100 + "1" + "}" * 101,
    "too large": '{"hyper": {}, "pad": "' + "x" * (17 << 20) + '"}',
    "steps in words": json.dumps({"hyper": {}, "steps": "1"}),
    "steps in a list": json.dumps({"hyper": {}, "online_steps": [1]}),
    "a list": "[]",
    "hyper-parameters in a list": json.dumps({"hyper": [1, 2]}),
    "no text": "\udcff",
}


@pytest.mark.parametrize("attack", CONFIGS)
def test_settings_of_runs(tmp_path: Path, attack: str) -> None:
    config, _ = run_folder(tmp_path)
    (config.folder / "config.json").write_bytes(CONFIGS[attack].encode(errors="surrogateescape"))
    with little_memory(), pytest.raises(RunError, match=f"{config.folder} is there and no run made it"):
        check_folder(config.folder, dataclasses.replace(config, resume=True))


def test_settings_are_shown_without_what_moves_a_cursor(tmp_path: Path) -> None:
    config, _ = run_folder(tmp_path)
    file = config.folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "agent": "\x1b[2J" + "x" * 5_000}))
    with pytest.raises(RunError, match="was started with --agent") as error:
        check_folder(config.folder, dataclasses.replace(config, resume=True))
    assert "\x1b" not in str(error.value)
    assert len(str(error.value)) < 500


METRICS: dict[str, tuple[str, str]] = {
    "no numbers": ("step,stage,penalty\n1,fidec,best\n", "could not convert"),
    "a step of 10,000 digits": ("step,stage\n" + "1" * 10_000 + ",fidec\n", "digit"),
    "no steps": ("stage\nfidec\n", "KeyError: 'step'"),
    "another column": ("step,stage,__class__\n1,fidec,1\n", "has a column '__class__'"),
    "a cell too many": ("step,stage\n1,fidec,1,1\n", "has a column None"),
    "a cell of a megabyte": ("step,stage\n1," + "x" * 1_000_000 + "\n", "field larger than"),
}


@pytest.mark.parametrize("attack", METRICS)
def test_metrics_of_runs(tmp_path: Path, attack: str) -> None:
    content, message = METRICS[attack]
    (tmp_path / "metrics.csv").write_text("step,stage,penalty\n1,fidec,0.5\n")
    Record(tmp_path, 1, [], ("penalty",)).close()
    (tmp_path / "metrics.csv").write_text(content)
    with pytest.raises(RunError, match=rf"metrics\.csv is no table.*{message}"):
        Record(tmp_path, 1, [], ("penalty",))


def test_a_table_that_never_ends(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "metrics.csv")
    with pytest.raises(RunError, match="not a regular file"):
        Record(tmp_path, 1, [], ())
    (tmp_path / "metrics.csv").unlink()
    with (tmp_path / "metrics.csv").open("wb") as file:
        file.truncate(10**13)
    with little_memory(), pytest.raises(RunError, match=r"has 10,000,000,000,000 bytes"):
        Record(tmp_path, 1, [], ())


# -- tables and results ------------------------------------------------------------------------------------------------

TABLES: dict[str, str] = {
    "nested": NESTED,
    "no kernels": '{"sm_90": []}',
    "no entries": '{"sm_90": {"flow": {}}}',
    "entries in words": '{"sm_90": {"flow": ["fast"]}}',
    "rows in words": '{"sm_90": {"flow": [{"rows": "16"}]}}',
    "no rows": '{"sm_90": {"flow": [{"problem_rows": 0}]}}',
    "endless rows": '{"sm_90": {"flow": [{"rows": 1e400}]}}',
    "a way in numbers": '{"sm_90": {"flow": [{"implementation": 1}]}}',
}


@pytest.mark.parametrize("attack", TABLES)
def test_tables_of_the_tuner(tmp_path: Path, attack: str) -> None:
    file = tmp_path / "configs.json"
    file.write_text(TABLES[attack])
    with pytest.raises(RuntimeError, match=r"configs\.json is no table of fdkernels .*: delete it"):
        table.read(file)
    file.unlink()
    os.mkfifo(file)
    assert table.read(file) == {}


@pytest.mark.parametrize("content", [NESTED, "[]", '{"rows": 1, "runs": {}}', '{"rows": [{"device": []}], "runs": {}}'])
def test_results_of_benchmarks(tmp_path: Path, content: str) -> None:
    file = tmp_path / "results.json"
    file.write_text(content)
    with pytest.raises(ResultError, match=r"results\.json is not a file of results"):
        load(file)
