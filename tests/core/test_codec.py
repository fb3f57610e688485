"""A memory survives its bytes, and damaged bytes never become a memory."""

from __future__ import annotations

import base64
from dataclasses import replace

import pytest
import torch

from softrag.codec import CODECS, decode, encode, encoded_size
from softrag.errors import MemoryCodecError, MemoryMismatchError, NonFiniteMemoryError
from softrag.memory import Memory

KEY = "0123456789abcdef0123456789abcdef"
FINGERPRINT = "f" * 32


def make_memory(values: torch.Tensor) -> Memory:
    return Memory(values=values, key=KEY, fingerprint=FINGERPRINT, n_document_tokens=128)


@pytest.fixture
def memory() -> Memory:
    """As the demo model makes it: 8 soft tokens of width 576 in bfloat16, with an outlier."""
    values = torch.randn(8, 576, generator=torch.Generator().manual_seed(0))
    values[:, 7] *= 20
    return make_memory(values.bfloat16())


@pytest.mark.parametrize("codec", CODECS)
def test_everything_but_the_values_comes_back_as_it_was(memory: Memory, codec: str) -> None:
    decoded = decode(encode(memory, codec))

    assert decoded.key == KEY
    assert decoded.fingerprint == FINGERPRINT
    assert decoded.n_document_tokens == 128
    assert decoded.values.shape == (8, 576)


@pytest.mark.parametrize(
    ("codec", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)], ids=["bf16", "fp16"]
)
def test_sixteen_bits_are_exact_for_values_of_their_dtype(codec: str, dtype: torch.dtype) -> None:
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    every_value = bits[torch.isfinite(bits)].view(16, -1)

    decoded = decode(encode(make_memory(every_value), codec)).values

    assert decoded.dtype == dtype
    assert torch.equal(decoded.view(torch.int16), every_value.view(torch.int16))


def test_int8_is_within_half_a_step_of_its_group_of_64(memory: Memory) -> None:
    values = memory.values.float()
    decoded = decode(encode(memory, "int8")).values

    step = values.view(8, 9, 64).abs().amax(-1, keepdim=True) / 127
    error = (decoded - values).view(8, 9, 64).abs()
    assert (error <= 0.502 * step).all()  # half a step, and the scale's rounding to bfloat16


def test_int4_is_within_half_a_step_of_its_group_of_32(memory: Memory) -> None:
    values = memory.values.float()
    decoded = decode(encode(memory, "int4")).values

    step = values.view(8, 18, 32).abs().amax(-1, keepdim=True) / 7
    error = (decoded - values).view(8, 18, 32).abs()
    assert (error <= 0.502 * step).all()


def test_fp8_is_within_a_sixteenth_of_each_value(memory: Memory) -> None:
    values = memory.values.float()
    decoded = decode(encode(memory, "fp8")).values

    smallest_step = values.abs().amax(-1, keepdim=True) / 448 * 2**-9
    assert ((decoded - values).abs() <= values.abs() / 16 + smallest_step).all()


@pytest.mark.parametrize(
    ("codec", "relative_error"),
    [("bf16", 0.0), ("fp16", 1e-5), ("int8", 0.015), ("fp8", 0.03), ("int4", 0.18)],
)
def test_smaller_codecs_cost_a_known_error(
    memory: Memory, codec: str, relative_error: float
) -> None:
    values = memory.values.float()
    decoded = decode(encode(memory, codec)).values.float()

    assert (decoded - values).norm() / values.norm() <= relative_error


@pytest.mark.parametrize(
    ("codec", "values"),
    [
        ("int8", [127.0, -127.0, 1.0, 0.0, 64.0]),
        ("fp8", [448.0, -448.0, 0.015625, 0.0, 240.0]),
        ("int4", [7.0, -7.0, 1.0, 0.0, -3.0]),
    ],
)
def test_values_on_the_grid_are_exact(codec: str, values: list[float]) -> None:
    tensor = torch.tensor([values, [0.0] * 5])  # a row of zeros does not divide by zero
    decoded = decode(encode(make_memory(tensor), codec)).values

    assert torch.equal(decoded, tensor)
    assert decoded.dtype == torch.float32


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("shape", [(1, 1), (3, 31), (2, 65), (16, 64)])
def test_any_shape_fits(codec: str, shape: tuple[int, int]) -> None:
    values = torch.ones(shape)
    data = encode(make_memory(values), codec)

    assert torch.allclose(decode(data).values.float(), values, rtol=2**-8)
    assert len(data) == encoded_size(*shape, codec)


@pytest.mark.parametrize(
    ("codec", "size"),
    [("bf16", 9316), ("fp16", 9316), ("int8", 4852), ("fp8", 4724), ("int4", 2692)],
)
def test_the_size_of_a_demo_memory_is_known(memory: Memory, codec: str, size: int) -> None:
    assert len(encode(memory, codec)) == size


def test_base64_takes_at_most_1_4_times_the_values(memory: Memory) -> None:
    assert len(base64.b64encode(encode(memory))) == 12_424
    assert 12_424 / memory.nbytes < 1.35


def test_the_same_memory_gives_the_same_bytes(memory: Memory) -> None:
    wider = torch.zeros(8, 1000, dtype=torch.bfloat16)
    wider[:, :576] = memory.values

    assert encode(memory) == encode(replace(memory, values=wider[:, :576]))


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_value_that_is_not_finite_is_refused(codec: str, value: float) -> None:
    values = torch.ones(2, 64)
    values[1, 3] = value

    with pytest.raises(NonFiniteMemoryError, match="1 values that are NaN or infinite"):
        encode(make_memory(values), codec)


@pytest.mark.parametrize(("codec", "value"), [("fp16", 65520.0), ("bf16", 3.4e38)])
def test_a_value_too_large_is_refused_and_never_becomes_infinite(codec: str, value: float) -> None:
    with pytest.raises(MemoryCodecError, match=f"too large for the codec {codec}"):
        encode(make_memory(torch.full((1, 2), value)), codec)


@pytest.mark.parametrize("codec", ["int8", "fp8", "int4"])
@pytest.mark.parametrize("value", [1e-45, 1e-38, 1e38])
def test_the_smallest_and_largest_values_stay_finite(codec: str, value: float) -> None:
    decoded = decode(encode(make_memory(torch.full((2, 64), value)), codec)).values

    assert torch.isfinite(decoded).all()
    assert torch.allclose(decoded, torch.full((2, 64), value), rtol=1 / 14, atol=1e-37)


@pytest.mark.parametrize(
    "values", [torch.ones(3), torch.ones(0, 4), torch.ones(2, 2, dtype=torch.int64)]
)
def test_only_rows_of_floats_are_a_memory(values: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"expected \(memory, hidden\) floating point"):
        encode(make_memory(values))


def test_an_unknown_codec_is_named_with_the_known_ones(memory: Memory) -> None:
    with pytest.raises(ValueError, match=r"'zip'\. Choose one of bf16, fp16, int8, fp8, int4"):
        encode(memory, "zip")


@pytest.mark.parametrize("codec", CODECS)
def test_a_change_of_any_byte_is_detected(codec: str) -> None:
    data = encode(make_memory(torch.randn(2, 40)), codec)

    for position in range(len(data)):
        for flip in (0x01, 0x80, 0xFF):
            damaged = bytearray(data)
            damaged[position] ^= flip
            with pytest.raises(MemoryCodecError):
                decode(bytes(damaged))


@pytest.mark.parametrize("codec", CODECS)
def test_truncation_at_any_length_is_detected(codec: str) -> None:
    data = encode(make_memory(torch.randn(2, 40)), codec)

    for length in range(len(data)):
        with pytest.raises(MemoryCodecError):
            decode(data[:length])
    with pytest.raises(MemoryCodecError):
        decode(data + b"\0")


@pytest.mark.parametrize("data", [b"", b"PK\x03\x04", b"\x80\x04\x95pickle", b"SMEX" + bytes(200)])
def test_foreign_bytes_are_named(data: bytes) -> None:
    with pytest.raises(MemoryCodecError, match="not written by softrag's codec"):
        decode(data)


def test_another_version_names_both(memory: Memory) -> None:
    data = bytearray(encode(memory))
    data[4] = 2

    with pytest.raises(
        MemoryCodecError, match=r"version 2; this softrag reads version 1\. Install"
    ):
        decode(bytes(data))


def test_a_memory_of_another_model_names_both_models_and_the_fix(memory: Memory) -> None:
    data = encode(memory)

    assert decode(data, fingerprint=FINGERPRINT).key == KEY
    with pytest.raises(MemoryMismatchError, match=r"f{32}, but the loaded model is a{32}.* again"):
        decode(data, fingerprint="a" * 32)
