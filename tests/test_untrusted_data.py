"""Datasets and behaviour policies that a stranger made: nothing executes, escapes or allocates."""

from __future__ import annotations

import io
import json
import os
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import h5py
import minari
import numpy as np
import pytest
from numpy.lib import format as npy
from safetensors.numpy import save_file

from tests.strangers import FILES, damaged, little_memory
from train.behaviour.policy import BadPolicy, BehaviourPolicy
from train.data import collected, hdf5, minari_cache, ogbench, room
from train.data.load import load_dataset
from train.data.spec import DatasetUnavailable
from train.data.unpacked import mapped
from train.environments import resolve

TERA = 10**12
NESTED = "[" * 100_000
MAZE = resolve("pointmaze-medium-navigate-singletask-v0")


# -- .npz archives -----------------------------------------------------------------------------------------------------


def columns() -> dict[str, np.ndarray]:
    """Two episodes of a point in a maze."""
    return {
        "observations": np.zeros((20, 2), np.float32),
        "actions": np.zeros((20, 2), np.float32),
        "terminals": np.arange(20) % 10 == 9,
        "qpos": np.zeros((20, 2), np.float32),
    }


def array(shape: Any, descr: Any = "<f4", content: bytes = b"", version: int = 1) -> bytes:
    """An .npy file with that header, and with whatever content."""
    text = f"{{'descr': {descr!r}, 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return (
        npy.MAGIC_PREFIX + bytes([version, 0]) + struct.pack("<H" if version == 1 else "<I", len(text)) + text + content
    )


def put(path: Path, packing: int = zipfile.ZIP_STORED, **members: bytes) -> None:
    """The good columns, but with these members in their places."""
    with zipfile.ZipFile(path, "w", packing) as archive:
        for name, values in columns().items():
            file = io.BytesIO()
            np.save(file, values)
            archive.writestr(f"{name}.npy", members.get(name, file.getvalue()))


def claim(path: Path, size: int) -> None:
    """Let the directory, and the entry itself, say that the observations unpack to so many bytes."""
    put(path, zipfile.ZIP_DEFLATED, observations=array(((size - 71) // 4,), content=bytes(1000)))
    content = bytearray(path.read_bytes())
    for mark, at in ((b"PK\x03\x04", 22), (b"PK\x01\x02", 24)):
        found = content.index(mark)
        content[found + at : found + at + 4] = struct.pack("<I", size)
    path.write_bytes(content)


def twice(path: Path) -> None:
    put(path)
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate name"):
        archive.writestr("observations.npy", array((2**40,)))


def escaping(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("../../observations.npy", "/tmp/observations.npy", "observations"):
            archive.writestr(name, array((1,), content=bytes(4)))


def of_the_future(path: Path) -> None:
    """The directory asks for a version of the format that there is not."""
    put(path)
    content = bytearray(path.read_bytes())
    content[content.index(b"PK\x01\x02") + 6] = 99
    path.write_bytes(content)


def large_directory(path: Path) -> None:
    """A directory of 60 MB, as many entries would need."""
    put(path)
    with zipfile.ZipFile(path, "a") as archive:
        for i in range(1000):
            info = zipfile.ZipInfo(f"{i}" + "x" * 60_000)
            archive.writestr(info, b"")


ARCHIVES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a terabyte in the header": (lambda path: put(path, observations=array((TERA // 4,))), r"has the shape \(250000"),
    "a shape that overflows": (lambda path: put(path, observations=array((2**40, 2**40))), "has the shape"),
    "no width, and endless": (lambda path: put(path, observations=array((2**62, 0))), "too big"),
    "a negative shape": (lambda path: put(path, observations=array((-1, -4), content=bytes(16))), "has the shape"),
    "a shape in words": (lambda path: put(path, observations=array("'wide'")), "shape is not valid"),
    "objects": (lambda path: put(path, observations=array((1,), "|O", b"cos\nsystem\n")), "allow_pickle"),
    "an object inside a record": (
        lambda path: put(path, observations=array((1,), [("a", "|O")], bytes(8))),
        "allow_pickle",
    ),
    "text": (lambda path: put(path, qpos=array((20, 2), "|S4", bytes(160))), "not numbers"),
    "a header of 4 GB": (
        lambda path: put(path, observations=npy.MAGIC_PREFIX + b"\x02\x00\xff\xff\xff\xff"),
        "has a header of 4,294,967,295 bytes",
    ),
    "a header of version 9": (lambda path: put(path, observations=array((1,), version=9)), "version"),
    "a nested header": (lambda path: put(path, observations=array("(" * 5_000)), "no header of an array"),
    "a header that is code": (
        lambda path: put(path, observations=array("__import__('os').abort()")),
        "malformed",
    ),
    "a gigabyte in a kilobyte": (lambda path: claim(path, 10**9), "cannot have 1,000,000,000 bytes in"),
    "packed by LZMA": (lambda path: put(path, zipfile.ZIP_LZMA), "packed otherwise than by NumPy"),
    "an array twice": (twice, "has observations 2 times"),
    "names that lead elsewhere": (escaping, "lacks observations"),
    "a directory of 60 MB": (large_directory, "directory is too large"),
    "a later version of zip": (of_the_future, "zip file version 9.9"),
    "flat positions": (lambda path: put(path, qpos=array((20,), content=bytes(80))), r"qpos have the shape \(20,\)"),
    "narrow positions": (lambda path: put(path, qpos=array((20, 0))), "broadcast"),
    "NaN": (
        lambda path: put(path, qpos=array((20, 2), content=np.full(40, np.nan, np.float32).tobytes())),
        "NaN or infinity in its qpos",
    ),
    "no archive": (lambda path: path.write_bytes(b"PK\x05\x06" + bytes(18)), "lacks observations"),
    "a pipe": (lambda path: os.mkfifo(path), "not a regular file"),
}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file of a dataset of OGBench, in a folder of its own."""
    pytest.importorskip("ogbench")
    monkeypatch.setattr(ogbench, "FOLDER", tmp_path / "ogbench")
    monkeypatch.setenv("FDKERNELS_DATA", str(tmp_path / "collected"))
    path: Path = MAZE.sources[0].path
    path.parent.mkdir()
    return path


@pytest.mark.parametrize("attack", ARCHIVES)
def test_archives(place: Path, tmp_path: Path, attack: str) -> None:
    make, message = ARCHIVES[attack]
    make(place)
    with little_memory(), pytest.raises(DatasetUnavailable, match=f"(?s){place} cannot be read.*{message}") as error:
        load_dataset(MAZE)
    assert "memory" not in str(error.value).lower(), "it was tried"
    assert [path.name for path in tmp_path.iterdir()] == ["ogbench"]


def test_the_archive_that_is_altered_loads(place: Path) -> None:
    put(place, zipfile.ZIP_DEFLATED)
    with little_memory():
        assert len(load_dataset(MAZE)) == 18


@pytest.mark.parametrize(
    "attack", ["a terabyte in the header", "objects", "a gigabyte in a kilobyte", "packed by LZMA"]
)
def test_parts_of_collected_data(tmp_path: Path, attack: str) -> None:
    make, message = ARCHIVES[attack]
    (part,) = collected.parts("pointmaze-medium-navigate", 10, tmp_path)
    part.parent.mkdir()
    make(part)
    with little_memory(), pytest.raises(collected.Unreadable, match=f"{part} is damaged.*{message}"):
        collected.read("pointmaze-medium-navigate", 10, tmp_path)


def test_more_than_there_is_memory_for(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    np.savez_compressed(place, **{**columns(), "observations": np.zeros((300_000, 2), np.float32)})
    assert place.stat().st_size < 20_000
    monkeypatch.setattr(room, "available", lambda: 1 << 20)
    with pytest.raises(
        DatasetUnavailable, match=r"observations takes 2,400,000 bytes of memory, and 1,048,576 are left"
    ) as error:
        load_dataset(MAZE)
    assert "delete" not in str(error.value), "nothing is wrong with the file"


def test_unpacking(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside an archive there may be links, and arrays that are not its own."""
    victim, path = tmp_path / "mine.txt", tmp_path / "some-v0.npz"
    victim.write_text("mine")
    images = np.arange(240, dtype=np.uint8).reshape(5, 4, 4, 3)
    np.savez_compressed(path, observations=images)
    unpacked = tmp_path / "some-v0.observations.npy"
    unpacked.with_name(unpacked.name + ".partial").symlink_to(victim)
    np.testing.assert_array_equal(mapped(path, "observations"), images)
    unpacked.unlink()
    unpacked.symlink_to(victim)
    np.testing.assert_array_equal(mapped(path, "observations"), images)
    assert not unpacked.is_symlink()
    (tmp_path / ".some-v0.observations.npy.lock").unlink()
    unpacked.unlink()
    (tmp_path / ".some-v0.observations.npy.lock").symlink_to(victim)
    with pytest.raises(OSError, match="symbolic links"):
        mapped(path, "observations")
    (tmp_path / ".some-v0.observations.npy.lock").unlink()
    whole = mapped(path, "observations")
    header = unpacked.read_bytes()
    for lie in (header.replace(b"'|u1'", b"'<i8'"), header.replace(b"(5, 4, 4, 3)", b"(9, 9, 9, 9)")):
        unpacked.write_bytes(lie)
        with pytest.raises(ValueError, match="has another array than"):
            mapped(path, "observations")
    unpacked.write_bytes(header)
    np.testing.assert_array_equal(mapped(path, "observations"), whole)
    unpacked.unlink()
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=0))
    with pytest.raises(OSError, match="takes 368 bytes, and 0 are free"):
        mapped(path, "observations")
    assert victim.read_text() == "mine"


# -- HDF5 --------------------------------------------------------------------------------------------------------------

STEPS = 10
DATASET = "strangers/hopper-v0"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A dataset in Minari's folder, which reads well."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    data = tmp_path / "minari" / DATASET / "data"
    data.mkdir(parents=True)
    space = json.dumps({"type": "Box", "dtype": "float32", "shape": [2], "low": [-1, -1], "high": [1, 1]})
    metadata = {"dataset_id": DATASET, "minari_version": minari.__version__, "data_format": "hdf5"}
    metadata |= {"total_episodes": 2, "total_steps": 2 * STEPS, "observation_space": space, "action_space": space}
    (data / "metadata.json").write_text(json.dumps(metadata))
    with h5py.File(data / "main_data.hdf5", "w") as file:
        for i in range(2):
            group = file.create_group(f"episode_{i}")
            for name, values in episode(i).items():
                group.create_dataset(name, data=values, chunks=True, maxshape=(None, *values.shape[1:]))
    return data


def episode(i: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(i)
    return {
        "observations": rng.standard_normal((STEPS + 1, 2), np.float32),
        "actions": rng.uniform(-1, 1, (STEPS, 2)).astype(np.float32),
        "rewards": rng.standard_normal(STEPS),
        "terminations": np.zeros(STEPS, bool),
        "truncations": np.arange(STEPS) == STEPS - 1,
    }


def noted(**changes: Any) -> Callable[[Path], None]:
    def apply(data: Path) -> None:
        file = data / "metadata.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return apply


def altered(edit: Callable[[h5py.Group, Path], Any], name: str = "observations") -> Callable[[Path], None]:
    """Take an array out of the second episode, and put something else there."""

    def apply(data: Path) -> None:
        with h5py.File(data / "main_data.hdf5", "a") as file:
            del file["episode_1"][name]
            edit(file["episode_1"], data)

    return apply


def elsewhere(data: Path) -> str:
    """Another file with an array that fits."""
    path = data.parent.parent / "elsewhere.hdf5"
    with h5py.File(path, "w") as file:
        file["found"] = episode(1)["observations"]
    return str(path)


def external(group: h5py.Group, data: Path) -> None:
    (data / "raw").write_bytes(episode(1)["observations"].tobytes())
    group.create_dataset("observations", (STEPS + 1, 2), "<f4", external=[(str(data / "raw"), 0, h5py.h5f.UNLIMITED)])


def virtual(group: h5py.Group, data: Path) -> None:
    layout = h5py.VirtualLayout((STEPS + 1, 2), "<f4")
    layout[:] = h5py.VirtualSource(elsewhere(data), "found", (STEPS + 1, 2))
    group.create_virtual_dataset("observations", layout)


def bomb(group: h5py.Group, data: Path) -> None:
    """A chunk of 256 kB, which is packed into half of that, but unpacks to 128 MB."""
    shape = (1 << 15, 2)
    made = group.create_dataset("observations", shape, "<f4", chunks=shape, compression="gzip")
    packer = zlib.compressobj(9)
    content = b"".join([*(packer.compress(bytes(1 << 20)) for _ in range(128)), packer.flush()])
    made.id.write_direct_chunk((0, 0), content)


def wide_chunk(group: h5py.Group, data: Path) -> None:
    """Few numbers, in a chunk of two gigabytes."""
    made = group.create_dataset(
        "observations", (0, 2), "<f4", chunks=(1 << 28, 2), maxshape=(None, 2), compression="gzip"
    )
    made.resize((STEPS + 1, 2))
    made.id.write_direct_chunk((0, 0), zlib.compress(bytes(1000)))


def a_part_unwritten(group: h5py.Group, data: Path) -> None:
    made = group.create_dataset("observations", (STEPS + 1, 2), "<f4", chunks=(1, 2))
    made[0] = 1


def of_one_file(data: Path) -> None:
    """The second episode is the first one again."""
    with h5py.File(data / "main_data.hdf5", "a") as file:
        del file["episode_1"]
        file["episode_1"] = file["episode_0"]


def vlen(group: h5py.Group, data: Path) -> None:
    group.create_dataset("observations", (STEPS + 1,), h5py.vlen_dtype(np.float32))


def cycle(group: h5py.Group, data: Path) -> None:
    group["observations"] = group


def linked(data: Path) -> None:
    with h5py.File(data / "main_data.hdf5", "a") as file:
        del file["episode_1"]
        file["episode_1"] = h5py.SoftLink("/episode_0")


PARTS = tuple("abcdefghijklmnopqrstuvw")
RECORDINGS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "nested metadata": (lambda data: (data / "metadata.json").write_text(NESTED), "nested too deeply"),
    "20 MB of metadata": (noted(pad="x" * 20_000_000), "has more than 16 MiB"),
    "metadata in a list": (lambda data: (data / "metadata.json").write_text("[]"), "TypeError"),
    "endless episodes": (noted(total_episodes=10**15), "lacks /episode_2"),
    "episodes in words": (noted(total_episodes="2"), "'2' episodes"),
    "another format": (noted(data_format="arrow"), "in the format 'arrow'"),
    "an external link": (
        altered(lambda group, data: group.__setitem__("observations", h5py.ExternalLink(elsewhere(data), "found"))),
        "episode_1/observations is a link",
    ),
    "a soft link": (
        altered(lambda group, data: group.__setitem__("observations", h5py.SoftLink("/episode_0/observations"))),
        "episode_1/observations is a link",
    ),
    "an episode that is a link": (linked, "/episode_1 is a link"),
    "an episode twice": (of_one_file, "/episode_0 has several names"),
    "a group in itself": (altered(cycle), "/episode_1 has several names"),
    "numbers in another file": (altered(external), "has its numbers in another file"),
    "numbers of another dataset": (altered(virtual), "has its numbers in another file"),
    "a terabyte never written": (
        altered(lambda group, data: group.create_dataset("observations", (TERA // 8, 2), "<f4", chunks=(1000, 2))),
        "cannot have 1,000,000,000,000 bytes in 0",
    ),
    "an array partly written": (altered(a_part_unwritten), "cannot have 88 bytes in 8"),
    "a chunk that unpacks to 128 MB": (altered(bomb), "does not unpack to its 262,144 bytes"),
    "a chunk of two gigabytes": (altered(wide_chunk), r"has chunks \(268435456, 2\)"),
    "a filter of others": (
        altered(lambda group, data: group.create_dataset("observations", data=np.zeros((11, 2)), compression="lzf")),
        "packed in a way that is not read here",
    ),
    "lists": (altered(vlen), "not an array of numbers"),
    "text": (altered(lambda group, data: group.create_dataset("observations", data=["a"] * 11)), "not an array of num"),
    "records": (
        altered(lambda group, data: group.create_dataset("rewards", data=np.zeros(10, [("a", "f4")])), "rewards"),
        "not an array of numbers",
    ),
    "bytes of images": (
        altered(lambda group, data: group.create_dataset("observations", data=np.zeros((11, 99), np.uint8))),
        "uint8, not floating-point",
    ),
    "no dimensions": (altered(lambda group, data: group.create_dataset("rewards", data=1.0), "rewards"), "rewards and"),
    "nothing at all": (
        altered(lambda group, data: group.create_dataset("rewards", data=h5py.Empty("f4")), "rewards"),
        "not an array of numbers",
    ),
    "many parts": (
        altered(lambda group, data: [group.create_dataset(f"observations/{part}", data=[1.0]) for part in PARTS]),
        "neither an array nor a few",
    ),
    "an episode without steps": (
        altered(
            lambda group, data: [
                (group.pop(name, None), group.create_dataset(name, data=np.zeros(0)))
                for name in ("rewards", "terminations", "truncations")
            ]
        ),
        "episode 1 has no steps",
    ),
    "no file of HDF5": (
        lambda data: (data / "main_data.hdf5").write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(99)),
        "OSError",
    ),
}


@pytest.mark.parametrize("attack", RECORDINGS)
def test_recordings(folder: Path, attack: str) -> None:
    make, message = RECORDINGS[attack]
    make(folder)
    with little_memory(), pytest.raises(minari_cache.Unreadable, match=message) as error:
        minari_cache.read(DATASET)
    assert "memory" not in str(error.value).lower(), "it was tried"


@pytest.mark.parametrize("how", ["plain", "packed"])
def test_the_recordings_that_are_altered_are_read(folder: Path, how: str) -> None:
    if how == "packed":
        with h5py.File(folder / "main_data.hdf5", "a") as file:
            for i in range(2):
                for name, values in episode(i).items():
                    del file[f"episode_{i}/{name}"]
                    file[f"episode_{i}"].create_dataset(
                        name, data=values, chunks=(3, *values.shape[1:]), compression="gzip", shuffle=True,
                        fletcher32=True,
                    )  # fmt: skip
    for i, found in enumerate(minari_cache.read(DATASET)):
        for name in ("observations", "actions", "rewards"):
            np.testing.assert_array_equal(getattr(found, name), episode(i)[name])
        assert found.masks.all()


def test_no_environment_is_made_that_a_dataset_names(folder: Path, tmp_path: Path) -> None:
    """Minari's own reader makes it if there are no spaces, which imports a module and calls a function of it."""
    from gymnasium.envs.registration import EnvSpec

    called = tmp_path / "called"
    spec = EnvSpec("Stranger-v0", "os:mkdir", kwargs={"path": str(called)}, disable_env_checker=True).to_json()
    file = folder / "metadata.json"
    metadata = json.loads(file.read_text()) | {"env_spec": spec, "eval_env_spec": spec}
    del metadata["observation_space"]
    file.write_text(json.dumps(metadata))
    with pytest.raises(Exception, match="must inherit from"):
        minari.load_dataset(DATASET)
    called.rmdir()  # a test that can fail: it was called
    assert len(minari_cache.read(DATASET)) == 2
    assert not called.exists()


def test_arrays_that_share_their_bytes(folder: Path) -> None:
    with h5py.File(folder / "main_data.hdf5") as file:
        arrays = hdf5.Arrays(file, 100)
        arrays.array(file["episode_0"], "observations")  # has 88 bytes
        with pytest.raises(ValueError, match="shares its bytes with other arrays, for the file has fewer"):
            arrays.array(file["episode_1"], "observations")


@pytest.mark.parametrize("files", FILES)
def test_recordings_at_random(folder: Path, files: int) -> None:
    """Whatever becomes of a file, it is read or refused."""
    refused = damaged(
        folder / "main_data.hdf5", lambda: minari_cache.read(DATASET), minari_cache.Unreadable, files, reach=8_000
    )
    assert 0 < refused <= files


@pytest.mark.parametrize("files", FILES)
def test_archives_at_random(tmp_path: Path, files: int) -> None:
    (part,) = collected.parts("pointmaze-medium-navigate", 10, tmp_path)
    part.parent.mkdir()
    put(part, zipfile.ZIP_DEFLATED)
    refused = damaged(
        part, lambda: collected.read("pointmaze-medium-navigate", 10, tmp_path), collected.Unreadable, files
    )
    assert 0 < refused <= files


# -- behaviour policies ------------------------------------------------------------------------------------------------


def weights(**changes: np.ndarray | None) -> dict[str, np.ndarray]:
    shapes = {"trunk.0": (8, 11), "trunk.2": (8, 8), "mean": (3, 8), "log_std": (3, 8)}
    made = {f"{layer}.weight": np.zeros(shape, np.float16) for layer, shape in shapes.items()}
    made |= {f"{layer}.bias": np.zeros(shape[0], np.float16) for layer, shape in shapes.items()}
    return {name: values for name, values in (made | changes).items() if values is not None}


BEHAVIOUR: dict[str, tuple[dict[str, Any], str]] = {
    "a layer less": ({"mean.bias": None}, "lacks mean.bias"),
    "a layer more": ({"trunk.4.weight": np.zeros(1)}, "should not have trunk.4.weight"),
    "another width": ({"trunk.2.weight": np.zeros((8, 7))}, "trunk.2 has a weight of shape"),
    "no dimensions": ({"trunk.0.weight": np.zeros(())}, "trunk.0 has a weight of shape"),
    "fewer deviations": ({"log_std.weight": np.zeros((2, 8)), "log_std.bias": np.zeros(2)}, "not equally wide"),
    "NaN": ({"mean.bias": np.full(3, np.nan)}, "mean.bias has float64, NaN or infinity"),
    "whole numbers": ({"mean.bias": np.zeros(3, np.int64)}, "mean.bias has int64"),
    "another environment": ({"trunk.0.weight": np.zeros((8, 17))}, r"not those of Hopper-v5"),
}


@pytest.mark.parametrize("attack", BEHAVIOUR)
def test_behaviour_policies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, attack: str) -> None:
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    changes, message = BEHAVIOUR[attack]
    file = tmp_path / "hopper-medium.safetensors"
    save_file(weights(**changes), file)
    with pytest.raises(DatasetUnavailable, match=f"{file} is .*{message}"):
        load_dataset(resolve("hopper-medium"), download=False, policies=tmp_path)
    assert not list((tmp_path / "minari").rglob("*.hdf5"))


def test_a_behaviour_policy_that_is_none(tmp_path: Path) -> None:
    file = tmp_path / "hopper-medium.safetensors"
    save_file(weights(), file)
    BehaviourPolicy.load(file)
    file.write_bytes(b"\xff" * 64)
    with little_memory(), pytest.raises(BadPolicy, match=f"{file} is no behaviour policy"):
        BehaviourPolicy.load(file)
