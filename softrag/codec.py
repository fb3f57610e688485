"""A memory as bytes, and back: exact or smaller, checked, no pickle. It knows no store.

One encoded memory, version 1, little-endian:

    magic       4 bytes   b"SMEM"
    version     1 byte    1
    codec       1 byte    position in `CODECS`
    memory      4 bytes   soft tokens
    hidden      4 bytes   width of a soft token
    n_document_tokens 4 bytes
    key         1 byte length, then UTF-8
    fingerprint 1 byte length, then UTF-8
    scales      bfloat16, one per group (int8, fp8 and int4 only)
    values      the soft tokens, row by row
    checksum    16 bytes  BLAKE2b of everything before it

The header and checksum take 100 bytes with a key and a fingerprint of 32 characters.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from hashlib import blake2b

import torch
from torch import Tensor

from softrag.errors import MemoryCodecError, MemoryMismatchError, NonFiniteMemoryError
from softrag.memory import Memory, is_finite

CODECS = ("bf16", "fp16", "int8", "fp8", "int4")

MAGIC = b"SMEM"
VERSION = 1
CHECKSUM_BYTES = 16

_FIXED_HEADER = struct.Struct("<4sBBIII")


@dataclass(frozen=True, kw_only=True)
class _Plain:
    """Values as they are, in `dtype`; decoded to `dtype`."""

    dtype: torch.dtype

    def nbytes(self, memory: int, hidden: int) -> int:
        return memory * hidden * self.dtype.itemsize

    def pack(self, values: Tensor) -> bytes:
        return _to_bytes(values.to(self.dtype))

    def unpack(self, data: bytes, memory: int, hidden: int) -> Tensor:
        return _from_bytes(data, self.dtype).view(memory, hidden)


@dataclass(frozen=True, kw_only=True)
class _Scaled:
    """Values divided by the largest magnitude of their group; decoded to float32.

    Attributes:
        group: Neighbouring values of a soft token that share a scale; None is the whole soft token.
        largest: What a group's largest magnitude is mapped to.
        dtype: Of the stored values: int8 (rounded), or a small float.
        bits: Per stored value; 4 packs two of -7..7 into a byte.
    """

    group: int | None
    largest: float
    dtype: torch.dtype
    bits: int = 8

    def _groups(self, hidden: int) -> tuple[int, int]:
        """Return (groups per soft token, values per group); the last group may be padded."""
        size = self.group or hidden
        return -(-hidden // size), size

    def nbytes(self, memory: int, hidden: int) -> int:
        groups, size = self._groups(hidden)
        return memory * groups * (2 + size * self.bits // 8)

    def pack(self, values: Tensor) -> bytes:
        memory, hidden = values.shape
        groups, size = self._groups(hidden)
        padded = torch.nn.functional.pad(values.float(), (0, groups * size - hidden))
        grouped = padded.view(memory, groups, size)
        # The scale is rounded to bfloat16 first and divided by afterwards, so that its rounding
        # costs range, never accuracy. Its smallest value keeps a group of zeros from dividing 0/0.
        scales = (grouped.abs().amax(dim=-1, keepdim=True) / self.largest).to(torch.bfloat16)
        scales = scales.clamp_min(torch.finfo(torch.bfloat16).tiny)  # (memory, groups, 1)
        levels = (grouped / scales.float()).clamp(-self.largest, self.largest)
        if self.dtype == torch.int8:
            levels = levels.round()
        stored = levels.to(self.dtype).flatten()
        if self.bits == 4:
            nibbles = (stored + 8).to(torch.uint8)  # -7..7 becomes 1..15
            stored = nibbles[0::2] | (nibbles[1::2] << 4)
        return _to_bytes(scales) + _to_bytes(stored)

    def unpack(self, data: bytes, memory: int, hidden: int) -> Tensor:
        groups, size = self._groups(hidden)
        border = memory * groups * 2
        scales = _from_bytes(data[:border], torch.bfloat16).view(memory, groups, 1)
        if self.bits == 4:
            packed = _from_bytes(data[border:], torch.uint8)
            levels = torch.stack((packed & 15, packed >> 4), dim=-1).float() - 8
        else:
            levels = _from_bytes(data[border:], self.dtype).float()
        values = levels.view(memory, groups, size) * scales.float()
        return values.view(memory, groups * size)[:, :hidden].contiguous()


_FORMS: dict[str, _Plain | _Scaled] = {
    "bf16": _Plain(dtype=torch.bfloat16),
    "fp16": _Plain(dtype=torch.float16),
    "int8": _Scaled(group=64, largest=127, dtype=torch.int8),
    "fp8": _Scaled(group=None, largest=448, dtype=torch.float8_e4m3fn),
    "int4": _Scaled(group=32, largest=7, dtype=torch.int8, bits=4),
}


def encode(memory: Memory, codec: str = "bf16") -> bytes:
    """Turn a memory into bytes.

    Args:
        memory: Its values are finite floating point numbers.
        codec: `"bf16"` and `"fp16"` keep 16 bits of a value, exactly when it has no more; `"int8"`
            (a scale per 64 values) and `"fp8"` (e4m3, a scale per soft token) keep 8, `"int4"`
            (a scale per 32 values) 4.

    Raises:
        NonFiniteMemoryError: A value is NaN or infinite.
        MemoryCodecError: A value is too large for the codec.
    """
    form = _FORMS.get(codec)
    if form is None:
        raise ValueError(f"Unknown codec {codec!r}. Choose one of {', '.join(CODECS)}.")
    values = memory.values.detach().cpu()
    if values.ndim != 2 or values.numel() == 0 or not values.is_floating_point():
        raise ValueError(
            f"Memory {memory.key} has values of shape {tuple(values.shape)} and {values.dtype}; "
            "expected (memory, hidden) floating point numbers, at least one of each."
        )
    if not is_finite(values):
        n_not_finite = int((~torch.isfinite(values)).sum())
        raise NonFiniteMemoryError(
            f"Memory {memory.key} has {n_not_finite} values that are NaN or infinite, so it was "
            "not encoded. Compress the document in bfloat16 or float32, and check the checkpoint."
        )
    body = form.pack(values)
    if not is_finite(form.unpack(body, *values.shape)):
        raise MemoryCodecError(
            f"Memory {memory.key} has values up to {values.float().abs().max():g}, too large for "
            f"the codec {codec}. Encode it as bf16."
        )

    header = _FIXED_HEADER.pack(
        MAGIC, VERSION, CODECS.index(codec), *values.shape, memory.n_document_tokens
    )
    data = header + _short(memory.key) + _short(memory.fingerprint) + body
    return data + _checksum(data)


def decode(data: bytes, *, fingerprint: str | None = None) -> Memory:
    """Turn bytes of `encode` into the memory again.

    Args:
        data: One whole encoded memory.
        fingerprint: Of the model that will read the memory; None accepts every model's.

    Returns:
        The memory, its values in bfloat16 (`bf16`), float16 (`fp16`) or float32 (all others).

    Raises:
        MemoryCodecError: The bytes are damaged, cut short, foreign or of another version.
        MemoryMismatchError: The memory belongs to another model.
    """
    data = bytes(data)
    if data[: len(MAGIC)] != MAGIC[: len(data)] or not data:
        raise MemoryCodecError(
            f"Expected an encoded memory, which starts with {MAGIC!r}, but found {data[:4]!r}. "
            "These bytes were not written by softrag's codec: compress the document again."
        )
    if len(data) > len(MAGIC) and data[len(MAGIC)] != VERSION:
        raise MemoryCodecError(
            f"The memory is of format version {data[len(MAGIC)]}; this softrag reads version "
            f"{VERSION}. Install the softrag that wrote it, or compress the document again."
        )
    if len(data) < _FIXED_HEADER.size + CHECKSUM_BYTES or (
        _checksum(data[:-CHECKSUM_BYTES]) != data[-CHECKSUM_BYTES:]
    ):
        raise MemoryCodecError(
            f"The memory is damaged or cut short: the checksum of its {len(data)} bytes does not "
            "match. Compress the document again."
        )

    _, _, codec_id, n_memory, hidden, n_document_tokens = _FIXED_HEADER.unpack_from(data)
    key, offset = _read_short(data, _FIXED_HEADER.size)
    made_by, offset = _read_short(data, offset)
    if fingerprint is not None and made_by != fingerprint:
        raise MemoryMismatchError(
            f"Memory {key} was made by the model {made_by}, but the loaded model is {fingerprint}. "
            "Compress the documents again with the loaded model, or load the model that made them."
        )
    body = data[offset:-CHECKSUM_BYTES]
    form = _FORMS[CODECS[codec_id]] if codec_id < len(CODECS) else None
    # The checksum holds, but another program could have written it.
    if form is None or len(body) != form.nbytes(n_memory, hidden):
        raise MemoryCodecError(
            f"The memory claims codec number {codec_id} and shape {(n_memory, hidden)}, which its "
            f"{len(body)} bytes of values are not. Compress the document again."
        )
    return Memory(
        values=form.unpack(body, n_memory, hidden),
        key=key,
        fingerprint=made_by,
        n_document_tokens=n_document_tokens,
    )


def encoded_size(memory: int, hidden: int, codec: str = "bf16") -> int:
    """Return the bytes `encode` gives for a `(memory, hidden)` memory.

    >>> encoded_size(8, 576)  # 9,216 bytes of values
    9316
    >>> encoded_size(8, 576, "int4")
    2692
    """
    names = 2 * (1 + 32)  # key and fingerprint
    return _FIXED_HEADER.size + names + _FORMS[codec].nbytes(memory, hidden) + CHECKSUM_BYTES


def _checksum(data: bytes) -> bytes:
    return blake2b(data, digest_size=CHECKSUM_BYTES).digest()


def _short(text: str) -> bytes:
    data = text.encode()
    if len(data) > 255:
        raise ValueError(f"A key or fingerprint is at most 255 bytes, but found {len(data)}.")
    return bytes([len(data)]) + data


def _read_short(data: bytes, offset: int) -> tuple[str, int]:
    """Return the text at `offset`, and where it ends."""
    end = offset + 1 + data[offset]
    return data[offset + 1 : end].decode(), end


def _to_bytes(values: Tensor) -> bytes:
    data: bytes = values.contiguous().view(torch.uint8).numpy().tobytes()
    return data


def _from_bytes(data: bytes, dtype: torch.dtype) -> Tensor:
    # A bytearray, because a tensor over read-only memory warns.
    return torch.frombuffer(bytearray(data), dtype=dtype)
