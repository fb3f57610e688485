"""The fused operations as Triton kernels for CUDA; same signatures as `reference`.

Each moves its bytes once: what a layer does between two matrix products is one launch.
"""

# Triton's language has neither annotations nor docstrings of arguments that linters expect.
# ruff: noqa: ANN001, ANN202, N803

from __future__ import annotations

import torch
import triton
import triton.language as tl

BLOCK_TOKENS = 64
MULTIPROCESSORS = 132


@triton.jit
def _add_norm(
    x,
    residual,
    weight,
    out,
    total,
    hidden,
    eps,
    HAS_RESIDUAL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * hidden
    column = tl.arange(0, BLOCK)
    inside = column < hidden
    value = tl.load(x + row + column, mask=inside, other=0.0)
    if HAS_RESIDUAL:
        value = value.to(tl.float32) + tl.load(residual + row + column, mask=inside, other=0.0).to(
            tl.float32
        )
        value = value.to(total.dtype.element_ty)
        tl.store(total + row + column, value, mask=inside)
    wide = value.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, axis=0) / hidden + eps)
    normed = (wide * scale).to(out.dtype.element_ty)
    gain = tl.load(weight + column, mask=inside, other=0.0)
    tl.store(out + row + column, normed * gain, mask=inside)


def add_norm(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `reference.add_norm`."""
    hidden = x.shape[1]
    out = torch.empty_like(x)
    total = x if residual is None else torch.empty_like(x)
    block = triton.next_power_of_2(hidden)
    _add_norm[(len(x),)](
        x,
        x if residual is None else residual,
        weight,
        out,
        total,
        hidden,
        eps,
        HAS_RESIDUAL=residual is not None,
        BLOCK=block,
        num_warps=min(16, max(1, block // 512)),
    )
    return out, total


@triton.jit
def _turn(
    states,
    weight,
    cos,
    sin,
    head,
    eps,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    NORM: tl.constexpr,
):
    """Load `(heads, 2 * HALF)` states, normalize and rotate them; returns both halves."""
    half = tl.arange(0, HALF)
    at = states + head[:, None] * (2 * HALF) + half[None, :]
    inside = (head < HEADS)[:, None]
    first = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(at + HALF, mask=inside, other=0.0).to(tl.float32)
    if NORM:
        squares = tl.sum(first * first, axis=1) + tl.sum(second * second, axis=1)
        scale = tl.rsqrt(squares / (2 * HALF) + eps)[:, None]
        kind = states.dtype.element_ty
        gain_1 = tl.load(weight + half)[None, :].to(tl.float32)
        gain_2 = tl.load(weight + HALF + half)[None, :].to(tl.float32)
        # Rounded where the reference rounds.
        first = ((first * scale).to(kind).to(tl.float32) * gain_1).to(kind).to(tl.float32)
        second = ((second * scale).to(kind).to(tl.float32) * gain_2).to(kind).to(tl.float32)
    return first * cos - second * sin, second * cos + first * sin


@triton.jit
def _rotate(
    qkv,
    positions,
    table,
    q_norm,
    k_norm,
    keys,
    values,
    slots,
    eps,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEADS_BLOCK: tl.constexpr,
    KV_BLOCK: tl.constexpr,
    HALF: tl.constexpr,
    PAGE: tl.constexpr,
    NORM: tl.constexpr,
    STORE: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    position = tl.load(positions + token).to(tl.int64)
    half = tl.arange(0, HALF)
    cos = tl.load(table + position * (2 * HALF) + half)[None, :]
    sin = tl.load(table + position * (2 * HALF) + HALF + half)[None, :]
    row = qkv + token * ((HEADS + 2 * KV_HEADS) * 2 * HALF)
    kind = qkv.dtype.element_ty

    head = tl.arange(0, HEADS_BLOCK)
    first, second = _turn(row, q_norm, cos, sin, head, eps, HEADS, HALF, NORM)
    at = row + head[:, None] * (2 * HALF) + half[None, :]
    inside = (head < HEADS)[:, None]
    tl.store(at, first.to(kind), mask=inside)
    tl.store(at + HALF, second.to(kind), mask=inside)

    head = tl.arange(0, KV_BLOCK)
    k_row = row + HEADS * 2 * HALF
    first, second = _turn(k_row, k_norm, cos, sin, head, eps, KV_HEADS, HALF, NORM)
    at = k_row + head[:, None] * (2 * HALF) + half[None, :]
    inside = (head < KV_HEADS)[:, None]
    tl.store(at, first.to(kind), mask=inside)
    tl.store(at + HALF, second.to(kind), mask=inside)
    if STORE:
        slot = tl.load(slots + token).to(tl.int64)
        place = ((slot // PAGE) * KV_HEADS + head) * PAGE + slot % PAGE  # (heads,)
        into = place[:, None] * (2 * HALF) + half[None, :]
        tl.store(keys + into, first.to(kind), mask=inside)
        tl.store(keys + into + HALF, second.to(kind), mask=inside)
        v_at = k_row + KV_HEADS * 2 * HALF + head[:, None] * (2 * HALF) + half[None, :]
        tl.store(values + into, tl.load(v_at, mask=inside), mask=inside)
        tl.store(values + into + HALF, tl.load(v_at + HALF, mask=inside), mask=inside)


def rotate(
    qkv: torch.Tensor,
    positions: torch.Tensor,
    table: torch.Tensor,
    q_norm: torch.Tensor | None,
    k_norm: torch.Tensor | None,
    eps: float,
    heads: int,
    kv_heads: int,
    keys: torch.Tensor | None = None,
    values: torch.Tensor | None = None,
    slots: torch.Tensor | None = None,
) -> None:
    """See `reference.rotate`."""
    store = keys is not None and values is not None and slots is not None
    _rotate[(len(qkv),)](
        qkv,
        positions,
        table,
        qkv if q_norm is None else q_norm,
        qkv if k_norm is None else k_norm,
        keys if store else qkv,
        values if store else qkv,
        slots if store else positions,
        eps,
        HEADS=heads,
        KV_HEADS=kv_heads,
        HEADS_BLOCK=triton.next_power_of_2(heads),
        KV_BLOCK=triton.next_power_of_2(kv_heads),
        HALF=table.shape[1] // 2,
        PAGE=keys.shape[2] if keys is not None else 1,
        NORM=q_norm is not None,
        STORE=store,
        num_warps=4,
    )


@triton.jit
def _silu_mul(gate_up, out, inner, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < inner
    gate = tl.load(gate_up + row * 2 * inner + column, mask=inside, other=0.0)
    up = tl.load(gate_up + row * 2 * inner + inner + column, mask=inside, other=0.0)
    wide = gate.to(tl.float32)
    activated = (wide / (1.0 + tl.exp(-wide))).to(gate.dtype)
    tl.store(out + row * inner + column, activated * up, mask=inside)


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """See `reference.silu_mul`."""
    tokens, inner = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty((tokens, inner))
    block = min(1024, triton.next_power_of_2(inner))
    _silu_mul[(tokens, triton.cdiv(inner, block))](gate_up, out, inner, BLOCK=block, num_warps=4)
    return out


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
