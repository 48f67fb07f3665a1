"""Checkpoint files: every format opens lazily, saving is whole or nothing, mistakes are explained."""

import errno
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import safetensors.torch
import torch

from minisd.checkpoints.files import CheckpointError, folded, open_tensors, save_safetensors
from minisd.checkpoints.files.entries import SAFETENSORS_NAMES, STORAGE_DTYPES, TORCH_DTYPES

DATA = Path(__file__).parent / "data"
FORMATS = ["safetensors", "zip", "legacy", "minisd"]


def write(path, tensors, format):
    match format:
        case "safetensors":
            safetensors.torch.save_file(tensors, path)
        case "zip":
            torch.save(tensors, path)
        case "legacy":
            torch.save(tensors, path, _use_new_zipfile_serialization=False)
        case "minisd":
            save_safetensors(path, tensors)


def random_tensor(dtype, *shape):
    nbytes = torch.empty(shape, dtype=dtype).nbytes
    raw = torch.randint(0, 2 if dtype == torch.bool else 256, (nbytes,), dtype=torch.uint8)
    return raw.view(dtype).view(shape)


def same_bits(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(raw(a), raw(b))


def raw(tensor):
    return tensor.contiguous().view(-1).view(torch.uint8)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", SAFETENSORS_NAMES, ids=str)
def test_every_dtype_comes_back_bit_for_bit(tmp_path, dtype, format):
    tensors = {"a": random_tensor(dtype, 3, 5), "empty": random_tensor(dtype, 0, 2), "scalar": random_tensor(dtype)}
    write(tmp_path / "x", tensors, format)
    file = open_tensors(tmp_path / "x")
    assert sorted(file) == ["a", "empty", "scalar"]
    assert file.shape("a") == (3, 5)
    assert file.dtype("a") == dtype
    for name, tensor in tensors.items():
        assert same_bits(file[name], tensor)
        assert same_bits(file.read(name), tensor)


@pytest.mark.parametrize("format", ["zip", "legacy"])
def test_complex128_is_read_from_pickles_though_safetensors_has_no_name_for_it(tmp_path, format):
    write(tmp_path / "x", {"a": torch.randn(3, dtype=torch.complex128)}, format)
    assert same_bits(open_tensors(tmp_path / "x")["a"], torch.load(tmp_path / "x")["a"])
    assert set(STORAGE_DTYPES.values()) <= set(TORCH_DTYPES.values())


@pytest.mark.parametrize("format", ["zip", "legacy"])
def test_pickled_views_and_parameters_equal_what_torch_loads(tmp_path, format):
    x = torch.randn(6, 8)
    tied = torch.nn.Parameter(torch.randn(4))
    tagged = torch.nn.Parameter(torch.randn(2))
    tagged.origin = "here"  # pickled through another function than a bare parameter
    tensors = {
        "t": x.t(),
        "slice": x[1::2, 2:5],
        "flip": x.permute(1, 0)[3],
        "tied": tied,
        "again": tied,
        "tag": tagged,
    }
    write(tmp_path / "x", tensors, format)
    file, reference = open_tensors(tmp_path / "x"), torch.load(tmp_path / "x", weights_only=False)
    for name in tensors:
        assert same_bits(file[name], reference[name].detach())
        assert same_bits(file.read(name), reference[name].detach())
        if format == "zip":  # the storages of legacy files are not aligned, their tensors are copied
            assert file[name].stride() == reference[name].stride()


@pytest.mark.parametrize("format", FORMATS)
def test_reading_in_another_dtype_equals_torch_to(tmp_path, format, monkeypatch):
    monkeypatch.setattr("minisd.checkpoints.files.mapped.CHUNK", 64)
    tensors = {"a": torch.randn(7, 19, dtype=torch.float16), "b": torch.randn(50)}
    write(tmp_path / "x", tensors, format)
    file = open_tensors(tmp_path / "x")
    for name, tensor in tensors.items():
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            assert same_bits(file.read(name, dtype), tensor.to(dtype))


@pytest.mark.parametrize("format", ["safetensors", "zip", "minisd"])
def test_tensors_are_views_of_one_map_and_editing_them_leaves_the_file_alone(tmp_path, format):
    write(tmp_path / "x", {"a": torch.ones(1000), "b": torch.ones(3)}, format)
    before = (tmp_path / "x").read_bytes()
    file = open_tensors(tmp_path / "x")
    a, b = file["a"], file["b"]
    assert file["a"].data_ptr() == a.data_ptr()
    assert a.data_ptr() - b.data_ptr() == file.entry("a").offset - file.entry("b").offset
    assert a.untyped_storage().nbytes() == 4000, "a view must not drag the whole file along"
    a.mul_(2)
    assert (tmp_path / "x").read_bytes() == before
    assert file.read("a").eq(1).all()


def test_a_tensor_outlives_its_file_object_and_the_file_itself(tmp_path):
    write(tmp_path / "x", {"a": torch.arange(10_000)}, "zip")
    tensor = open_tensors(tmp_path / "x")["a"]
    (tmp_path / "x").unlink()
    assert torch.equal(tensor, torch.arange(10_000))


def test_the_format_is_told_by_content_not_by_extension(tmp_path):
    for format, name in (("zip", "a.safetensors"), ("legacy", "b.safetensors"), ("safetensors", "c.ckpt")):
        write(tmp_path / name, {"w": torch.ones(2)}, format)
        assert open_tensors(tmp_path / name)["w"].tolist() == [1, 1]


def test_lightning_checkpoint_opens_without_lightning_and_names_what_it_dropped():
    file = open_tensors(DATA / "lightning_style.ckpt")
    assert file.dropped == ("pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",)
    assert file.extra == {"epoch": 3, "global_step": 470000, "pytorch-lightning_version": "1.4.2"}
    assert file.tree["callbacks"] == {}
    assert file.tree["lr_schedulers"] == [{"last_epoch": 5}]
    assert len(file) == 9
    assert file.shape("model.diffusion_model.input_blocks.0.0.weight") == (320, 4, 3, 3)
    assert torch.equal(file["cond_stage_model.transformer.text_model.embeddings.position_ids"][0], torch.arange(77))
    assert file["model_ema.num_updates"] == 1000
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64).square().float()
    torch.testing.assert_close(file["betas"], betas, rtol=1e-6, atol=0)  # float64 linspace of another library
    assert file.verify()


def test_textual_inversion_layouts_are_reachable_in_the_tree(tmp_path):
    vectors = torch.randn(2, 4)
    for stored in ({"*": vectors}, torch.nn.ParameterDict({"*": vectors})):
        torch.save(
            {"string_to_token": {"*": 265}, "string_to_param": stored, "name": "cat", "step": 7}, tmp_path / "e.pt"
        )
        file = open_tensors(tmp_path / "e.pt")
        assert file.tree["string_to_token"] == {"*": 265}
        assert file.extra == {"name": "cat", "step": 7}
        assert same_bits(file["string_to_param.*"], vectors)
        assert same_bits(file.read(file.tree["string_to_param"]["*"]), vectors)


def test_a_bare_tensor_has_the_empty_name(tmp_path):
    torch.save(torch.ones(3), tmp_path / "x.pt")
    assert open_tensors(tmp_path / "x.pt")[""].tolist() == [1, 1, 1]


def test_an_unknown_name_is_answered_with_the_nearest(tmp_path):
    write(tmp_path / "x", {"encoder.weight": torch.ones(1)}, "minisd")
    with pytest.raises(KeyError, match=r"near: 'encoder\.weight'"):
        open_tensors(tmp_path / "x")["encoder.wieght"]


# Saving


def test_what_minisd_saves_is_read_by_safetensors_with_its_metadata(tmp_path):
    tensors = {f"w{i}": random_tensor(dtype, 2, 3) for i, dtype in enumerate(SAFETENSORS_NAMES)}
    save_safetensors(tmp_path / "x", tensors, {"config": json.dumps({"ä": 1})})
    loaded = safetensors.torch.load_file(tmp_path / "x")
    assert all(same_bits(loaded[name], tensor) for name, tensor in tensors.items())
    file = open_tensors(tmp_path / "x")
    assert json.loads(file.metadata["config"]) == {"ä": 1}
    assert all(entry.offset % entry.dtype.itemsize == 0 for entry in file.entries.values())
    assert file.verify()


def test_equal_content_gives_equal_bytes(tmp_path):
    a, b = torch.randn(3), torch.randn(4, dtype=torch.float64)
    save_safetensors(tmp_path / "1", {"a": a, "b": b}, {"k": "1", "l": "2"})
    save_safetensors(tmp_path / "2", {"b": b, "a": a}, {"l": "2", "k": "1"})
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()


def test_views_and_shared_tensors_are_saved_by_value(tmp_path):
    x = torch.randn(4, 6)
    tensors = {
        "x": x,
        "t": x.t(),
        "row": x[1],
        "wide": x[:, :1].expand(4, 9),
        "conj": torch.randn(2, dtype=torch.cfloat).conj(),
    }
    save_safetensors(tmp_path / "x", tensors)
    assert all(same_bits(open_tensors(tmp_path / "x")[name], t.resolve_conj()) for name, t in tensors.items())


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_folded_table_is_read_whole_and_is_as_small_as_its_distinct_rows(tmp_path, dtype):
    distinct = torch.randn(5, 64).to(dtype)
    table = distinct[torch.randint(5, (1000,), generator=torch.Generator().manual_seed(0))]
    save_safetensors(tmp_path / "x", folded("a", table) | {"b": table})
    file = open_tensors(tmp_path / "x")
    assert sorted(file) == ["a", "b"]
    assert file.shape("a") == (1000, 64)
    assert file.verify()
    assert same_bits(file["a"], table)
    assert same_bits(file.read("a", torch.float64), table.double())
    assert sum(t.numel() for t in folded("a", table).values()) == 5 * 64 + 1000


def test_a_small_file_cannot_ask_for_a_table_of_any_size(tmp_path):
    tensors = {"a": torch.zeros(1, 4096), "a.minisd_rows": torch.zeros(150_000, dtype=torch.int32)}
    save_safetensors(tmp_path / "x", tensors)
    with pytest.raises(CheckpointError, match="a would unfold to 2,457,600,000 bytes, allowed are"):
        open_tensors(tmp_path / "x")


@pytest.mark.parametrize("rows", [[0, 5], [-1], [[0]], [0.0]])
def test_a_damaged_folded_table_is_refused(tmp_path, rows):
    rows = torch.tensor(rows)
    rows = rows if rows.is_floating_point() else rows.int()
    save_safetensors(tmp_path / "x", {"a": torch.zeros(5, 2), "a.minisd_rows": rows})
    with pytest.raises(CheckpointError, match=r"x: .*(points beyond the 5 rows of a: damaged|no folded table)"):
        open_tensors(tmp_path / "x")["a"]


def test_a_file_can_be_saved_over_itself_while_mapped(tmp_path):
    path = tmp_path / "x"
    save_safetensors(path, {"a": torch.arange(5), "b": torch.ones(3)}, {"k": "v"})
    file = open_tensors(path)
    save_safetensors(path, {"a": file["a"], "c": file["b"]}, file.metadata)
    assert torch.equal(file.read("a"), torch.arange(5)), "the file opened before the change still reads the old bytes"
    assert sorted(open_tensors(path)) == ["a", "c"]
    assert open_tensors(path).metadata["k"] == "v"
    assert open_tensors(path).verify()
    assert os.listdir(tmp_path) == ["x"]


@pytest.mark.parametrize("failing", ["files.os.fsync", "files.os.replace", "checkpoints.files.safe._bytes_of"])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()], ids=repr)
def test_a_failed_save_leaves_the_old_file_and_no_temporary(tmp_path, monkeypatch, failing, error):
    path = tmp_path / "x"
    save_safetensors(path, {"a": torch.ones(3)})
    before = path.read_bytes()

    def fail(*_):
        raise error

    monkeypatch.setattr(f"minisd.{failing}", fail)
    with pytest.raises(type(error)):
        save_safetensors(path, {"a": torch.zeros(3)})
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["x"]


@pytest.mark.skipif(sys.platform == "win32", reason="file size limits are POSIX")
def test_a_disk_that_fills_up_while_writing_is_reported_with_the_path(tmp_path):
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    save_safetensors(tmp_path / "x", {"a": torch.ones(3)})
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
        with pytest.raises(OSError, match=r"nothing was changed.*x'"):
            save_safetensors(tmp_path / "x", {"a": torch.zeros(200_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert open_tensors(tmp_path / "x")["a"].tolist() == [1, 1, 1]
    assert os.listdir(tmp_path) == ["x"]


@pytest.mark.parametrize(
    ("tensors", "metadata", "complaint"),
    [
        ({"a": torch.ones(2, dtype=torch.complex128)}, {}, "a is torch.complex128"),
        ({"a": torch.ones(2).to_sparse()}, {}, "sparse_coo"),
        ({"a": torch.ones(2, device="meta")}, {}, "on meta"),
        ({"__metadata__": torch.ones(2)}, {}, "cannot save '__metadata__'"),
        ({"a": [1.0]}, {}, "cannot save 'a'"),
        ({"a": torch.ones(2)}, {"step": 3}, "metadata must map str to str"),
    ],
)
def test_what_the_format_cannot_hold_is_refused_before_anything_is_written(tmp_path, tensors, metadata, complaint):
    with pytest.raises(ValueError, match=complaint):
        save_safetensors(tmp_path / "x", tensors, metadata)
    assert os.listdir(tmp_path) == []


def test_a_changed_config_or_name_in_a_saved_file_is_seen_on_opening(tmp_path):
    save_safetensors(tmp_path / "x", {"weight": torch.ones(3)}, {"config": '{"levels":4}'})
    good = (tmp_path / "x").read_bytes()
    for old, new in (
        (b"levels", b"Levels"),
        (b'"weight"', b'"height"'),
        (b"F32", b"I32"),
        (b"header_sha", b"feader_sha"),
    ):
        (tmp_path / "x").write_bytes(good.replace(old, new))
        with pytest.raises(CheckpointError, match="not the one minisd wrote"):
            open_tensors(tmp_path / "x")


@pytest.mark.parametrize("format", ["zip", "minisd"])
def test_verify_finds_one_flipped_bit_among_the_weights(tmp_path, format):
    write(tmp_path / "x", {"a": torch.ones(1000)}, format)
    assert open_tensors(tmp_path / "x").verify()
    data = bytearray((tmp_path / "x").read_bytes())
    data[open_tensors(tmp_path / "x").entry("a").offset + 777] ^= 1
    (tmp_path / "x").write_bytes(data)
    with pytest.raises(CheckpointError, match="checksum"):
        open_tensors(tmp_path / "x").verify()


def test_verify_says_false_where_a_file_has_no_checksum(tmp_path):
    for format in ("safetensors", "legacy"):
        write(tmp_path / "x", {"a": torch.ones(3)}, format)
        assert open_tensors(tmp_path / "x").verify() is False


@pytest.mark.skipif(not hasattr(torch.serialization, "set_crc32_options"), reason="torch before 2.6 always sums")
def test_a_zip_written_without_checksums_is_read_all_the_same(tmp_path):
    previous = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    write(tmp_path / "x", {"a": torch.ones(3)}, "zip")
    torch.serialization.set_crc32_options(previous)
    assert open_tensors(tmp_path / "x")["a"].tolist() == [1, 1, 1]
    assert open_tensors(tmp_path / "x").verify() is False


# What is no checkpoint


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty"),
        (b"<!DOCTYPE html><html><body>Sign in</body></html>", "web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 4265380512\n", "git lfs pull"),
        (b"\x89PNG\r\n\x1a\n" + b"x" * 50, "PNG image"),
        (b"\xff\xd8\xff\xe0" + b"x" * 50, "JPEG image"),
        (b"\x1f\x8b\x08" + b"x" * 50, "gzip archive: unpack"),
        (b"7z\xbc\xaf\x27\x1c" + b"x" * 50, "7z archive"),
        (b"Rar!\x1a\x07\x01" + b"x" * 50, "RAR archive"),
        (b"GGUF\x03\0\0\0" + b"x" * 50, "GGUF"),
        (b"Access denied\n", "text of 14 bytes beginning 'Access denied"),
        (b"\0" * 5000, "unfinished download"),
        (b"\xde\xad\xbe\xef" * 9, "begins with the bytes de ad be ef"),
        (b"\x89HDF\r\n\x1a\n" + b"x" * 50, "HDF5"),
        (b"PK\x05\x06" + b"\0" * 18, "not one of torch.save"),
        (b"\x80\x04K\x01.", "not one of torch.save"),
    ],
)
def test_other_files_are_named_for_what_they_are(tmp_path, content, message):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as error:
        open_tensors(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("format", FORMATS)
def test_a_truncated_download_is_said_to_be_cut_short(tmp_path, format):
    write(tmp_path / "x", {"a": torch.randn(1000)}, format)
    data = (tmp_path / "x").read_bytes()
    (tmp_path / "x").write_bytes(data[: len(data) // 2])
    with pytest.raises(CheckpointError, match="cut short"):
        open_tensors(tmp_path / "x")


def test_absent_paths_and_directories_are_answered_with_what_is_there(tmp_path):
    write(tmp_path / "v1-5-pruned.safetensors", {"a": torch.ones(1)}, "minisd")
    with pytest.raises(CheckpointError, match=r"did you mean v1-5-pruned\.safetensors"):
        open_tensors(tmp_path / "v1-5-prunned.safetensors")
    with pytest.raises(CheckpointError, match=r"is a directory.*v1-5-pruned"):
        open_tensors(tmp_path)
    with pytest.raises(CheckpointError, match="nor does its folder"):
        open_tensors(tmp_path / "no" / "x")


def test_a_whole_pickled_module_and_a_torchscript_archive_are_explained(tmp_path):
    torch.save(torch.nn.Linear(2, 2), tmp_path / "module.pt")
    with pytest.raises(CheckpointError, match=r"torch\.nn\.modules\.linear\.Linear.*state_dict"):
        open_tensors(tmp_path / "module.pt")
    with zipfile.ZipFile(tmp_path / "script.pt", "w") as archive:
        for name in ("top/data.pkl", "top/code/__torch__.py"):
            archive.writestr(name, b"x")
    with pytest.raises(CheckpointError, match="TorchScript"):
        open_tensors(tmp_path / "script.pt")


def test_a_repacked_zip_is_read_when_stored_and_refused_when_compressed(tmp_path):
    write(tmp_path / "x", {"a": torch.ones(500)}, "zip")
    for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        with zipfile.ZipFile(tmp_path / "x") as old, zipfile.ZipFile(tmp_path / "y", "w", method) as new:
            for name in old.namelist():
                new.writestr(name, old.read(name))
        if method == zipfile.ZIP_STORED:
            assert open_tensors(tmp_path / "y").verify()
    with pytest.raises(CheckpointError, match="compressed"):
        open_tensors(tmp_path / "y")


def test_a_safetensors_header_whose_length_looks_like_another_format_is_still_read(tmp_path):
    for magic in (b"\x80\x02", b"PK\x03\x04", b"\x1f\x8b"):
        header = b'{"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]}}'
        length = int.from_bytes(magic, "little") % (1 << 24)
        (tmp_path / "x").write_bytes(length.to_bytes(8, "little") + header.ljust(length) + b"\x05\x06")
        assert open_tensors(tmp_path / "x")["a"].tolist() == [5, 6]


# Memory


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_loading_half_precision_into_float32_peaks_at_what_is_kept(tmp_path):
    weights = {f"w{i}": torch.zeros(10 << 20, dtype=torch.float16) for i in range(7)}
    write(tmp_path / "x", weights, "minisd")
    write(tmp_path / "y", weights, "zip")
    script = (
        "import sys, torch; from minisd.checkpoints.files import open_tensors\n"
        "status = lambda key: int(next(l for l in open('/proc/self/status') if l.startswith(key)).split()[1]) << 10\n"
        "torch.zeros(3, dtype=torch.float16).float(); before = status('VmRSS')\n"
        "files = [open_tensors(path) for path in sys.argv[1:]]\n"
        "kept = [file.read(name, torch.float32) for file in files for name in file]\n"
        "print((status('VmHWM') - before) / sum(tensor.nbytes for tensor in kept))"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "x"), str(tmp_path / "y")]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert 0.9 < float(result.stdout) < 1.1
