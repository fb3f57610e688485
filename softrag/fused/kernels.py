"""The fused operations as Triton kernels for CUDA; same signatures as `reference`.

Each moves its bytes once: what a layer does between two matrix products is one launch.
"""

# Triton's language has no types for what linters and type checkers want to see.
# ruff: noqa: ANN001, ANN202
# mypy: ignore-errors

from __future__ import annotations

import torch
import triton
import triton.language as tl

from softrag.fused.decode_kernel import decode_attention

__all__ = ["add_norm", "decode_attention", "rotate", "silu_mul"]


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
    assert qkv.is_contiguous()
    assert positions.is_contiguous()
    assert slots is None or slots.is_contiguous()
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
