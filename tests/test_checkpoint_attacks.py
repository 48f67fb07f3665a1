"""Checkpoint files from strangers: no code of theirs runs, bombs stay small, damage is either seen or harmless."""

import contextlib
import copyreg
import io
import os
import pickle
import random
import re
import struct
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch

from minisd.checkpoints.files import CheckpointError, open_tensors, save_safetensors
from minisd.checkpoints.files.entries import Malformed
from minisd.checkpoints.files.pickles import settle, unpickle


class Touch:
    """Creates a file when it is made, restored or called upon: a stand-in for any class an attacker finds."""

    def __new__(cls, path=None, **_):
        if path:
            Path(path).touch()
        return object.__new__(cls)

    def __setstate__(self, path):
        Path(path).touch()


def text(string):
    return b"X" + struct.pack("<I", len(string.encode())) + string.encode()


def name(module, attribute):
    return f"c{module}\n{attribute}\n".encode()


TOUCH = name(__name__, "Touch")
TENSOR = (
    name("torch._utils", "_rebuild_tensor_v2")
    + (b"((" + text("storage") + name("torch", "FloatStorage") + text("0") + text("cpu") + b"K\x03tQ")
    + (b"K\x00K\x03\x85K\x01\x85\x89" + name("collections", "OrderedDict") + b")RtR")
)
FILE = text("FILE")  # replaced by the path of the file that a payload would create
SCRIPT = text("open('FILE', 'w')")
PAYLOADS = {
    "reduce a function": name("builtins", "open") + b"(" + FILE + text("w") + b"tR",
    "os.system": name("os", "system") + text("touch FILE") + b"\x85R",
    "eval": name("builtins", "eval") + SCRIPT + b"\x85R",
    "exec": name("builtins", "exec") + SCRIPT + b"\x85R",
    "python 2 names": b"\x80\x02" + name("__builtin__", "eval") + SCRIPT + b"\x85R",
    "getattr chain": name("builtins", "getattr") + name("builtins", "__dict__") + text("get") + b"\x86R"
    + text("open") + b"\x85R" + FILE + text("w") + b"\x86R",
    "stack global": text("builtins") + text("open") + b"\x93" + FILE + text("w") + b"\x86R",
    "dotted stack global": text(__name__) + text("Path.touch") + b"\x93" + TOUCH.replace(b"Touch", b"Path")
    + FILE + b"\x85R\x85R",
    "inst": b"(" + FILE + text("w") + b"ibuiltins\nopen\n",
    "obj": b"(" + name("builtins", "open") + FILE + text("w") + b"o",
    "newobj": TOUCH + FILE + b"\x85\x81",
    "newobj with keywords": TOUCH + b")}" + text("path") + FILE + b"s\x92",
    "build": TOUCH + b")\x81" + FILE + b"b",
    "copyreg": name("copyreg", "__newobj__") + TOUCH + FILE + b"\x86R",
    "extension code": b"\x82\xf0" + FILE + text("w") + b"\x86R",
    "a torch function": name("torch", "save") + b"K\x01" + FILE + b"\x86R",
    "as a dictionary key": b"}" + name("builtins", "open") + FILE + text("w") + b"\x86RK\x01s",
    "as an argument of a tensor": name("torch._utils", "_rebuild_parameter") + b"("
    + name("builtins", "open") + FILE + text("w") + b"\x86R\x89}tR",
    "popped again": b"K\x01" + name("builtins", "open") + FILE + text("w") + b"\x86R0",
    "numpy": name("numpy", "savetxt") + FILE + b"]K\x01a\x86R",
}  # fmt: skip


def armed(payload, path):
    """The payload with its FILE set to path and the lengths of its strings put right."""
    for old in ("FILE", "open('FILE', 'w')", "touch FILE"):
        payload = payload.replace(text(old), text(old.replace("FILE", str(path))))
    return payload


def torch_zip(path, pickled):
    """A zip of torch.save around any pickle; it has one storage, "0", of the floats 0, 1, 2."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("top/data.pkl", pickled)
        archive.writestr("top/byteorder", b"little")
        archive.writestr("top/data/0", struct.pack("<3f", 0, 1, 2))
        archive.writestr("top/version", b"3\n")


def state_dict(bad):
    pairs = text("before") + TENSOR + text("bad") + bad + text("after") + TENSOR
    return b"\x80\x04}" + text("state_dict") + b"}(" + pairs + b"us."


@pytest.fixture
def extension():
    copyreg.add_extension("builtins", "open", 0xF0)
    yield
    copyreg.remove_extension("builtins", "open", 0xF0)


@pytest.mark.usefixtures("extension")
@pytest.mark.parametrize("payload", PAYLOADS.values(), ids=PAYLOADS)
def test_no_payload_fires_and_the_tensors_beside_it_still_load(tmp_path, payload):
    payload, victim = armed(payload, tmp_path / "fired"), tmp_path / "fired"
    with contextlib.suppress(Exception):  # some end in an error, having done their harm
        Rehearsal(io.BytesIO(b"\x80\x04" + payload + b".")).load()
    assert victim.exists(), "the payload must be live, or this test shows nothing"
    victim.unlink()

    torch_zip(tmp_path / "x.ckpt", state_dict(payload))
    file = open_tensors(tmp_path / "x.ckpt")
    assert not victim.exists()
    assert file["before"].tolist() == file["after"].tolist() == [0, 1, 2]
    assert all(not name.startswith("bad") for name in file)
    assert file.dropped


class Rehearsal(pickle.Unpickler):
    """The standard library's unpickler, which does run payloads; used to show that ours would have had to."""

    def persistent_load(self, pid):
        return None


@pytest.mark.usefixtures("extension")
@pytest.mark.parametrize("payload", PAYLOADS.values(), ids=PAYLOADS)
def test_no_payload_fires_in_a_legacy_file_nor_in_place_of_its_magic_number(tmp_path, payload):
    payload, buffer = armed(payload, tmp_path / "fired"), io.BytesIO()
    torch.save({"bad": "PLACE"}, buffer, _use_new_zipfile_serialization=False)
    for content in (buffer.getvalue().replace(text("PLACE"), payload), b"\x80\x04" + payload + b"."):
        (tmp_path / "x.pt").write_bytes(content)
        with pytest.raises(CheckpointError, match=r"x\.pt"):
            open_tensors(tmp_path / "x.pt")
        assert not (tmp_path / "fired").exists()


def test_the_tensor_used_here_is_one_that_torch_reads(tmp_path):
    torch_zip(tmp_path / "x", state_dict(b"K\x01"))
    assert torch.load(tmp_path / "x", weights_only=False)["state_dict"]["after"].tolist() == [0, 1, 2]
    assert open_tensors(tmp_path / "x").tree["state_dict"]["bad"] == 1


def test_state_cannot_be_pushed_into_the_functions_that_build_tensors(tmp_path):
    defaults = name("torch._utils", "_rebuild_parameter") + b"N}" + text("__defaults__") + b")s\x86b0K\x01"
    torch_zip(tmp_path / "x", state_dict(defaults))
    assert open_tensors(tmp_path / "x")["after"].tolist() == [0, 1, 2]
    assert torch._utils._rebuild_parameter.__defaults__ is None


def test_long_keys_cannot_multiply_into_longer_names(tmp_path):
    levels = b"".join(b"}" + text(character * 1000) for character in "abc")
    torch_zip(tmp_path / "x", b"\x80\x04" + levels + TENSOR + b"sss.")
    with pytest.raises(CheckpointError, match="names beyond 2000"):
        open_tensors(tmp_path / "x")


@pytest.mark.parametrize(
    ("stride", "offset", "shape", "message"),
    [
        (b"K\x01\x85", b"K\x01", b"K\x03\x85", "ends outside its storage"),
        (b"K\x02\x85", b"K\x00", b"K\x03\x85", "ends outside its storage"),
        (b"K\x00\x85", b"K\x00", b"J\x00\x00\x00\x40\x85", "overlaps itself"),
        (b"J\xff\xff\xff\xff\x85", b"K\x00", b"K\x03\x85", "not what torch writes"),
        (b"K\x01\x85", b"J\xff\xff\xff\xff", b"K\x01\x85", "not what torch writes"),
        (b"K\x01K\x01\x86", b"K\x00", b"K\x03\x85", "not what torch writes"),
        (b"(" + b"K\x01" * 70 + b"t", b"K\x00", b"(" + b"K\x00" * 70 + b"t", "more dimensions"),
        (b"K\x01\x85", b"K\x00", b"\x8a\x09\x00\x00\x00\x00\x00\x00\x00\x00\x01\x85", "not what torch writes"),
    ],
)
def test_a_tensor_must_lie_inside_its_storage_and_not_on_itself(tmp_path, stride, offset, shape, message):
    bad = TENSOR.replace(b"K\x00K\x03\x85K\x01\x85", offset + shape + stride)
    torch_zip(tmp_path / "x", state_dict(bad))
    with pytest.raises(CheckpointError, match=message):
        open_tensors(tmp_path / "x")


BOMBS = {
    "lists of the same lists": b"]q\x00" + (b"(" + b"h\x00" * 10 + b"lq\x00") * 30,
    "a list that holds itself": b"]q\x00h\x00a",
    "nested tuples": b")" + b"\x85" * 100_000,
    "nested tuples as a key": b"})" + b"\x85" * 100_000 + b"K\x01s",
    "doubled tuples as a key": b"})" + b"q\x00h\x00\x86" * 64 + b"K\x01s",
    "doubled tuples as a shape": name("torch", "Size") + b")" + b"q\x00h\x00\x86" * 64 + b"\x85R",
    "one list copied again and again": b"(" + b"K\x01" * 50_000 + b"lq\x00("
    + (name("builtins", "set") + b"h\x00\x85R") * 50_000 + b"l",
    "a memo index of four billion": b"K\x01r\xff\xff\xff\xff",
    "a string longer than the file": b"\x8d" + struct.pack("<Q", 1 << 40),
    "a bytearray longer than the file": b"\x96" + struct.pack("<Q", 1 << 40),
    "a huge integer": b"\x8b" + struct.pack("<i", 1 << 20) + b"\x7f" * (1 << 20),
    "a storage of a huge size": b"(" + text("storage") + name("torch", "FloatStorage") + text("0") + text("cpu")
    + b"\x8b" + struct.pack("<i", 5000) + b"\x7f" * 5000 + b"tQ",
    "colliding integer keys": b"}(" + b"".join(
        b"\x8a\x0c" + (i * (2**61 - 1)).to_bytes(12, "little") + b"N" for i in range(50_000)
    ) + b"u",
    "a name of a megabyte": name("a" * (1 << 20), "b"),
}  # fmt: skip


@pytest.mark.parametrize("bomb", BOMBS.values(), ids=BOMBS)
def test_a_pickle_bomb_is_refused_or_harmless_within_seconds(bomb):
    begin, message = time.perf_counter(), ""
    try:
        machine = unpickle(io.BytesIO(b"\x80\x04" + bomb + b"."))
        settle(machine.value, {"0": 0}, machine.dropped)
    except Malformed as error:
        message = str(error)
    assert len(message) < 1000
    assert time.perf_counter() - begin < 10


# Random damage


def make(path, format):
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "model.weight": torch.randn(4, 5, generator=generator),
        "model.half": torch.randn(6, generator=generator).half(),
        "ids": torch.arange(7),
    }
    match format:
        case "zip":
            torch.save({"state_dict": tensors, "global_step": 3}, path)
        case "legacy":
            torch.save({"state_dict": tensors, "global_step": 3}, path, _use_new_zipfile_serialization=False)
        case "minisd":
            save_safetensors(path, tensors, {"config": '{"width": 320}'})
        case "safetensors":
            from safetensors.torch import save_file

            save_file(tensors, path, {"config": '{"width": 320}'})


def damage(data, rng):
    data, at = bytearray(data), rng.randrange(len(data))
    length = rng.choice([1, 1, 2, 8, 64])
    match rng.randrange(6):
        case 0:
            data[at] ^= 1 << rng.randrange(8)
        case 1:
            data[at] = rng.randrange(256)
        case 2:
            data[at : at + length] = bytes(len(data[at : at + length]))
        case 3:
            data[at:at] = rng.randbytes(length)
        case 4:
            del data[at : at + length]
        case 5:
            del data[at:]
    return bytes(data)


def content(file):
    tensors = {name: (file.dtype(name), file.shape(name)) for name in file}
    return tensors, file.metadata, file.extra


def outcome(path):
    """What opening, viewing, reading and verifying a damaged file comes to; any error but CheckpointError escapes."""
    try:
        file = open_tensors(path)
        seen = {name: file[name].clone().contiguous().view(-1).view(torch.uint8).tolist() for name in file}
        read = {name: file.read(name).view(-1).view(torch.uint8).tolist() for name in file}
    except CheckpointError as error:
        return str(error), None, "refused"
    assert seen == read
    try:
        verified = file.verify()
    except CheckpointError:
        verified = "damaged"
    return content(file), seen, verified


def damage_is_seen(folder, format, seed, rounds):
    """Share of damaged files that were refused on opening."""
    rng, path, refused = random.Random(seed), Path(folder) / f"{format}{seed}", 0
    make(path, format)
    good, original = path.read_bytes(), outcome(path)
    for _ in range(rounds):
        path.write_bytes(damage(good, rng))
        found, weights, verified = outcome(path)
        if verified == "refused":
            refused += 1
            assert str(path) in found
        elif format in ("zip", "minisd"):  # the others carry no checksum of their names
            assert found == original[0], "names, shapes, dtypes, metadata and plain values are never wrong"
            assert weights == original[1] or verified == "damaged", "verify() sees every change of the weights"
    return refused / rounds


@pytest.mark.parametrize("format", ["safetensors", "minisd", "zip", "legacy"])
def test_random_damage_is_refused_or_harmless_and_never_a_crash(tmp_path, format):
    assert damage_is_seen(tmp_path, format, seed=1, rounds=300) > 0.3


def test_random_damage_does_not_bring_the_process_down(tmp_path):
    script = (
        "import sys; from test_checkpoint_attacks import damage_is_seen\n"
        "for format in ('safetensors', 'minisd', 'zip', 'legacy'): damage_is_seen(sys.argv[1], format, 2, 300)"
    )
    command = [sys.executable, "-X", "faulthandler", "-c", script, str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("keys", [["0", 5], [["0"]], ["0", "0"], "0", []], ids=repr)
def test_a_legacy_pickle_whose_list_of_storages_is_not_its_own_is_refused(tmp_path, keys):
    path = tmp_path / "legacy.pt"
    torch.save({"w": torch.ones(3)}, path, _use_new_zipfile_serialization=False)
    data = path.read_bytes()
    own = re.search(rb"\x80\x02\]q.*?\.(?=\x03\x00\x00\x00\x00\x00\x00\x00)", data, re.DOTALL)
    path.write_bytes(data.replace(own[0], pickle.dumps(keys, 2)))
    with pytest.raises(CheckpointError, match=re.escape(str(path))):
        open_tensors(path)
