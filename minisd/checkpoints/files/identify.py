"""What a file is when it is no checkpoint, and what its owner can do about it."""

from __future__ import annotations

import codecs
import difflib
import os

_FETCH = "download the file itself again"
_UNPACK = "unpack it and give the file inside"
_MAGIC = (
    (b"version https://git-lfs", "a Git-LFS pointer, the real file was not downloaded: run `git lfs pull`"),
    (b"GGUF", "a GGUF file (llama.cpp, stable-diffusion.cpp): get the safetensors or ckpt version"),
    (b"\x89PNG", "a PNG image, not a checkpoint"),
    (b"\xff\xd8\xff", "a JPEG image, not a checkpoint"),
    (b"GIF8", "a GIF image, not a checkpoint"),
    (b"RIFF", "a RIFF file (WebP image or sound), not a checkpoint"),
    (b"%PDF", "a PDF document, not a checkpoint"),
    (b"\x1f\x8b", f"a gzip archive: {_UNPACK}"),
    (b"7z\xbc\xaf\x27\x1c", f"a 7z archive: {_UNPACK}"),
    (b"Rar!\x1a\x07", f"a RAR archive: {_UNPACK}"),
    (b"BZh", f"a bzip2 archive: {_UNPACK}"),
    (b"\xfd7zXZ", f"an xz archive: {_UNPACK}"),
    (b"\x28\xb5\x2f\xfd", f"a zstd archive: {_UNPACK}"),
    (b"\x93NUMPY", "a NumPy array: save its tensors as safetensors"),
    (b"\x89HDF", "an HDF5 (Keras) file: only PyTorch and safetensors checkpoints are read"),
    (b"\x08", "perhaps an ONNX or TensorFlow model: only PyTorch and safetensors checkpoints are read"),
)


def why_unreadable(path: str) -> str | None:
    """What keeps a path from being opened at all; None if it is a readable file."""
    if os.path.isdir(path):
        inside = sorted(name for name in os.listdir(path) if name.endswith((".safetensors", ".ckpt", ".bin", ".pt")))
        return "is a directory; give a file in it" + (f", e.g. {inside[0]}" if inside else "")
    folder, name = os.path.split(os.path.abspath(path))
    if os.path.islink(path) and not os.path.exists(path):
        return f"is a link to {os.readlink(path)}, which does not exist"
    if not os.path.exists(path):
        if not os.path.isdir(folder):
            return f"does not exist, nor does its folder {folder}"
        near = difflib.get_close_matches(name, os.listdir(folder), n=3)
        return "does not exist" + (f"; did you mean {' or '.join(near)}?" if near else f" in {folder}")
    if not os.path.isfile(path):
        return "is not a regular file"
    if not os.access(path, os.R_OK):
        return "may not be read: change its permissions"
    return None


def _is_text(head: bytes) -> bool:
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head)  # a character cut in two at the end is no error
    except UnicodeDecodeError:
        return False
    return all(byte >= 32 or byte in b"\t\n\r\f" for byte in head)


def what_is(head: bytes, size: int) -> str:
    """A sentence about a file that begins with head and is no checkpoint of a known kind."""
    for magic, sentence in _MAGIC:
        if head.startswith(magic):
            return f"it is {sentence}"
    if head[257:262] == b"ustar":
        return f"it is a tar archive (also torch before 0.2 wrote such files): {_UNPACK}"
    text = head.lstrip().lower()
    if text.startswith((b"<!doctype", b"<html", b"<head", b"<?xml")):
        return f"it is a web page, such as a log-in or error page in place of the file: {_FETCH}"
    if not any(head):
        return f"it begins with {len(head)} zero bytes, as an unfinished download does: {_FETCH}"
    if _is_text(head):
        return f"it is a text of {size:,} bytes beginning {head[:60].decode('utf-8', 'replace')!r}: {_FETCH}"
    return f"it begins with the bytes {head[:8].hex(' ')}, which no checkpoint does: {_FETCH}"
