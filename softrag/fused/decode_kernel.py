"""Attention of one new token per row over a paged cache, as a Triton kernel for CUDA.

All query heads that share a key head are one small matrix product, so keys and values are read
once and never repeated. Where rows and heads are too few to fill the device, a row's tokens are
split over several programs whose results are joined (flash decoding: Dao et al., 2023).
"""

# Triton's language has no types for what linters and type checkers want to see.
# ruff: noqa: ANN001, ANN202
# mypy: ignore-errors

from __future__ import annotations

import torch
import triton
import triton.language as tl

BLOCK_TOKENS = 64
MULTIPROCESSORS = 132


@triton.jit
def _decode(
    qkv,
    keys,
    values,
    tables,
    lengths,
    out,
    part,
    part_max,
    part_sum,
    scale,
    table_stride,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP_BLOCK: tl.constexpr,
    DIM: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK: tl.constexpr,
    SPLITS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    GROUP: tl.constexpr = HEADS // KV_HEADS
    length = tl.load(lengths + row).to(tl.int32)
    share = tl.cdiv(tl.cdiv(length, SPLITS), BLOCK) * BLOCK
    start = split * share
    end = tl.minimum(start + share, length)

    member = tl.arange(0, GROUP_BLOCK)
    dim = tl.arange(0, DIM)
    head = kv_head * GROUP + member
    real = member < GROUP
    q = tl.load(
        qkv + row * ((HEADS + 2 * KV_HEADS) * DIM) + head[:, None] * DIM + dim[None, :],
        mask=real[:, None],
        other=0.0,
    )
    # Powers of two are cheaper than of e.
    scale *= 1.4426950408889634
    top = tl.full((GROUP_BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((GROUP_BLOCK,), tl.float32)
    mix = tl.zeros((GROUP_BLOCK, DIM), tl.float32)
    for at in range(start, end, BLOCK):
        token = at + tl.arange(0, BLOCK)
        known = token < end
        page = tl.load(tables + row * table_stride + token // PAGE, mask=known, other=0)
        place = (page.to(tl.int64) * KV_HEADS + kv_head) * PAGE + token % PAGE
        k = tl.load(
            keys + place[None, :] * DIM + dim[:, None], mask=known[None, :], other=0.0
        )  # (dim, tokens)
        v = tl.load(
            values + place[:, None] * DIM + dim[None, :], mask=known[:, None], other=0.0
        )  # (tokens, dim)
        score = tl.dot(q, k, input_precision="ieee") * scale
        score = tl.where(known[None, :], score, float("-inf"))
        new_top = tl.maximum(top, tl.max(score, axis=1))
        weight = tl.exp2(score - new_top[:, None])
        fade = tl.exp2(top - new_top)
        total = total * fade + tl.sum(weight, axis=1)
        mix = mix * fade[:, None] + tl.dot(weight.to(v.dtype), v, input_precision="ieee")
        top = new_top
    if SPLITS == 1:
        tl.store(
            out + row * (HEADS * DIM) + head[:, None] * DIM + dim[None, :],
            (mix / total[:, None]).to(out.dtype.element_ty),
            mask=real[:, None],
        )
    else:
        place = (row * HEADS + head) * SPLITS + split
        tl.store(part + place[:, None] * DIM + dim[None, :], mix, mask=real[:, None])
        tl.store(part_max + place, top, mask=real)
        tl.store(part_sum + place, total, mask=real)


@triton.jit
def _join(part, part_max, part_sum, out, DIM: tl.constexpr, SPLITS: tl.constexpr):
    """Put the splits of one head of one row together."""
    head = tl.program_id(0).to(tl.int64)
    split = tl.arange(0, SPLITS)
    dim = tl.arange(0, DIM)
    top = tl.load(part_max + head * SPLITS + split)
    weight = tl.exp2(top - tl.max(top, axis=0))
    total = tl.sum(tl.load(part_sum + head * SPLITS + split) * weight, axis=0)
    mix = tl.load(part + (head * SPLITS + split)[:, None] * DIM + dim[None, :])
    joined = tl.sum(mix * weight[:, None], axis=0) / total
    tl.store(out + head * DIM + dim, joined.to(out.dtype.element_ty))


def decode_attention(
    qkv: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    tables: torch.Tensor,
    lengths: torch.Tensor,
    scale: float,
    heads: int,
    longest: int | None = None,
) -> torch.Tensor:
    """See `reference.decode_attention`; `longest` is not needed."""
    assert qkv.is_contiguous()
    assert lengths.is_contiguous()
    rows = len(qkv)
    kv_heads, page, dim = keys.shape[1:]
    # Enough programs to fill the device, where rows and heads alone are too few.
    splits = min(32, max(1, 2 * MULTIPROCESSORS // (rows * kv_heads)))
    splits = 1 << (splits.bit_length() - 1)
    out = qkv.new_empty((rows, heads * dim))
    part = qkv.new_empty((rows, heads, splits, dim) if splits > 1 else (1,), dtype=torch.float32)
    part_max = qkv.new_empty((rows, heads, splits) if splits > 1 else (1,), dtype=torch.float32)
    part_sum = torch.empty_like(part_max)
    _decode[(rows, kv_heads, splits)](
        qkv,
        keys,
        values,
        tables,
        lengths,
        out,
        part,
        part_max,
        part_sum,
        scale,
        tables.stride(0),
        HEADS=heads,
        KV_HEADS=kv_heads,
        GROUP_BLOCK=max(16, triton.next_power_of_2(heads // kv_heads)),
        DIM=dim,
        PAGE=page,
        BLOCK=BLOCK_TOKENS if dim <= 128 else BLOCK_TOKENS // 2,
        SPLITS=splits,
        num_warps=4,
        num_stages=3 if qkv.element_size() == 2 else 1,
    )
    if splits > 1:
        _join[(rows * heads,)](part, part_max, part_sum, out, DIM=dim, SPLITS=splits, num_warps=4)
    return out
