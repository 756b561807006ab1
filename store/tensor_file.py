"""A safetensors file that is written piece by piece: no tensor need ever be in memory as a whole, nor be copied to be written.

The layout is that of safetensors (https://huggingface.co/docs/safetensors), which reads it: the length of the header, the header,
and the tensors, those of the widest dtype first, and then by name.
"""

import errno
import json
import math
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor

METADATA_KEY = "exactivations"  # one key only: safetensors does not keep the order of several, and files must be byte-identical
DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
MOST_AT_ONCE = 2**30  # bytes: Linux writes 2 GiB at most at once, other systems refuse more
Shapes = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]

assert sys.byteorder == "little", "files of tensors are little-endian, and are written from memory as it is"


class TensorFile:
    """A file that is being written: rows of its tensors are appended in their order, those of different tensors in any.

    The header, with the checksum of everything, comes last; before it is there, nobody can take the file for a whole one.

    Args:
        path: Where; what is there is lost.
        shapes: Dtype and shape of each tensor, by name.
        metadata: What the header says besides, as JSON takes it.
    """

    def __init__(self, path: Path, shapes: Shapes, metadata: Mapping[str, Any]) -> None:
        assert "checksum" not in metadata, "the checksum is made here"
        assert "__metadata__" not in shapes, "no tensor can have the name of the metadata"
        for name, (dtype, _) in shapes.items():
            assert dtype in DTYPES, f"{name}: {dtype} is written nowhere here; known are {', '.join(map(str, DTYPES))}"
        self._shapes, self._metadata, self._offsets = dict(shapes), dict(metadata), _offsets(shapes)
        self._digests = {name: xxhash.xxh3_128() for name in self._shapes}
        start = 8 + len(self._header("0" * 32))
        self._next = {name: start + begin for name, (begin, _) in self._offsets.items()}
        self._ends = {name: start + end for name, (_, end) in self._offsets.items()}
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)

    def append(self, name: str, rows: Tensor) -> None:
        """Writes the next rows of a tensor."""
        assert rows.dtype == self._shapes[name][0], f"{name}: planned {self._shapes[name][0]}, got {rows.dtype}"
        content = bytes_of(rows)
        assert self._next[name] + len(content) <= self._ends[name], f"{name}: more rows than were planned"
        self._digests[name].update(content)
        self._write(content, self._next[name])
        self._next[name] += len(content)

    def finish(self) -> None:
        """Writes the header and closes the file: it is whole, but not yet flushed to disk."""
        assert self._next == self._ends, f"rows are missing: written up to {self._next}, planned {self._ends}"
        header = self._header(combined(self._metadata, self._shapes, {name: d.hexdigest() for name, d in self._digests.items()}))
        self._write(memoryview(len(header).to_bytes(8, "little") + header), 0)
        self.close()

    def close(self) -> None:
        """Closes the file as it is; doing it twice is no error."""
        descriptor, self._descriptor = self._descriptor, -1  # closed even if closing fails, as on a full network disk it may
        if descriptor >= 0:
            os.close(descriptor)

    def _header(self, checksum: str) -> bytes:
        metadata = {METADATA_KEY: json.dumps({**self._metadata, "checksum": checksum}, sort_keys=True)}
        entries = {
            name: {"dtype": DTYPES[self._shapes[name][0]], "shape": self._shapes[name][1], "data_offsets": offsets}
            for name, offsets in self._offsets.items()
        }
        header = json.dumps({"__metadata__": metadata, **entries}, separators=(",", ":"), ensure_ascii=False).encode()
        return header + b" " * (-len(header) % 8)  # so that every tensor begins at a multiple of its own width

    def _write(self, content: memoryview, position: int) -> None:
        while content:
            written = os.pwrite(self._descriptor, content[:MOST_AT_ONCE], position)
            if not written:
                raise OSError(errno.ENOSPC, "the file system took no more bytes")
            content, position = content[written:], position + written


def _offsets(shapes: Shapes) -> dict[str, tuple[int, int]]:
    """Returns where each tensor begins and ends, counted from the end of the header, in the order of the file."""
    offsets, end = {}, 0
    for name in sorted(shapes, key=lambda name: (-shapes[name][0].itemsize, name)):
        dtype, shape = shapes[name]
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        offsets[name] = (begin, end)
    return offsets


def checksum(tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> str:
    """Returns the xxh3-128 over metadata, names, dtypes, shapes and the xxh3-128 of each tensor's bytes, in the order of names."""
    digests = {name: xxhash.xxh3_128(bytes_of(tensor)).hexdigest() for name, tensor in tensors.items()}
    return combined(metadata, shapes_of(tensors), digests)


def combined(metadata: Mapping[str, Any], shapes: Shapes, digests: Mapping[str, str]) -> str:
    """Returns the checksum of tensors of which the digest of the bytes is known."""
    digest = xxhash.xxh3_128(json.dumps(dict(metadata), sort_keys=True).encode())
    for name in sorted(shapes):
        dtype, shape = shapes[name]
        digest.update(f"{name}|{dtype}|{list(shape)}|{digests[name]}".encode())
    return digest.hexdigest()


def shapes_of(tensors: Mapping[str, Tensor]) -> Shapes:
    """Returns dtype and shape of each tensor."""
    return {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}


def bytes_of(tensor: Tensor) -> memoryview:
    """Returns the bytes of a tensor on the host; without a copy if it is contiguous."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
