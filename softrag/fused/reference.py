"""The fused operations in plain torch: any device and dtype. They say what the kernels compute."""

from __future__ import annotations

import torch
from torch import nn


def add_norm(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Add to the residual stream and normalize it (root mean square).

    Args:
        x: `(T, hidden)`.
        residual: `(T, hidden)`, or None for zeros.
        weight: `(hidden,)`.
        eps: Keeps the root above zero.

    Returns:
        The normalized sum and the sum, both `(T, hidden)`.
    """
    total = x if residual is None else x + residual
    return _norm(total, weight, eps), total


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
    """Normalize and rotate queries and keys in place; copy keys and values into a cache.

    Args:
        qkv: `(T, (heads + 2 * kv_heads) * head_dim)`, changed in place.
        positions: `(T,)`.
        table: `(positions, head_dim)` float32: cosines, then sines.
        q_norm: `(head_dim,)` weights of the queries' norm, or None for no norm.
        k_norm: As `q_norm`, for keys.
        eps: Of the norms.
        heads: Query heads.
        kv_heads: Key and value heads.
        keys: `(pages, kv_heads, page, head_dim)` cache, or None for no cache.
        values: As `keys`.
        slots: `(T,)` place in the cache, `page_number * page + offset`.
    """
    q, k, v = split_heads(qkv, heads, kv_heads)
    cos, sin = table[positions][:, None].chunk(2, dim=-1)  # (T, 1, head_dim / 2) each
    for states, weight in ((q, q_norm), (k, k_norm)):
        normed = states if weight is None else _norm(states, weight, eps)
        first, second = normed.float().chunk(2, dim=-1)
        turned = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
        states.copy_(turned)
    if keys is not None and values is not None and slots is not None:
        page = keys.shape[2]
        number, offset = slots // page, slots % page
        keys[number, :, offset] = k
        values[number, :, offset] = v


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """Return silu(gate) * up, `(T, inner)`, of `(T, 2 * inner)`."""
    gate, up = gate_up.chunk(2, dim=-1)
    return nn.functional.silu(gate) * up


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
    """Attend with one query per row to that row's pages of the cache.

    Args:
        qkv: `(rows, (heads + 2 * kv_heads) * head_dim)`, rotated; keys and values are cached.
        keys: `(pages, kv_heads, page, head_dim)`.
        values: As `keys`.
        tables: `(rows, pages of a row)` page numbers.
        lengths: `(rows,)` tokens of each row in the cache.
        scale: Of the scores.
        heads: Query heads.
        longest: At least the largest of `lengths`, where known without waiting for the device.

    Returns:
        `(rows, heads * head_dim)`.
    """
    kv_heads, page = keys.shape[1:3]
    longest = int(lengths.max()) if longest is None else longest
    used = tables[:, : -(-longest // page)].long()
    q = split_heads(qkv, heads, kv_heads)[0][:, :, None]  # (rows, heads, 1, dim)
    k, v = (_gather(cache, used) for cache in (keys, values))
    mask = torch.arange(k.shape[2], device=k.device) < lengths[:, None]
    attended = nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=mask[:, None, None], scale=scale, enable_gqa=heads != kv_heads
    )
    return attended.flatten(1)


def split_heads(
    qkv: torch.Tensor, heads: int, kv_heads: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """View `(T, (heads + 2 * kv_heads) * head_dim)` as queries, keys, values `(T, heads, dim)`."""
    both = qkv.view(len(qkv), heads + 2 * kv_heads, -1)
    q, k, v = both.split([heads, kv_heads, kv_heads], dim=1)
    return q, k, v


def _gather(cache: torch.Tensor, used: torch.Tensor) -> torch.Tensor:
    """Return `(rows, kv_heads, tokens, head_dim)` of the pages `(rows, pages)`."""
    # One gather per head keeps every copied piece a whole page.
    return cache.transpose(0, 1)[:, used].flatten(2, 3).transpose(0, 1)


def _norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * wide.to(x.dtype)
