"""Sequences of different lengths as one row without padding, and the attention that reads it.

`PACKED_ATTENTION` is an attention implementation for transformers' `AttentionInterface`. Given
`cu_seq_lens` it treats one long row as many sequences; without, it is plain sdpa, so the same
model still generates from padded batches. It knows nothing of compressors or decoders.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

PACKED_ATTENTION = "softrag_packed"


# (query, key, value, borders, longest, scale, window) -> output, each row-packed.
Fused = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, int, "float | None", "int | None"],
    torch.Tensor,
]


class Packed(NamedTuple):
    """Where the real tokens of a padded batch are; T tokens in all.

    Attributes:
        slot: `(T,)` positions in the flattened `(batch * tokens)` batch.
        row: `(T,)` the row each token belongs to.
        position: `(T,)` its position in that row, from 0.
        cu_seq_lens: `(batch + 1,)` int32 borders of the rows.
        lengths: `(batch,)` tokens of each row.
        max_length: Tokens of the longest row.
    """

    slot: torch.Tensor
    row: torch.Tensor
    position: torch.Tensor
    cu_seq_lens: torch.Tensor
    lengths: torch.Tensor
    max_length: int

    def to(self, device: torch.device) -> Packed:
        """Return a copy on a device."""
        parts = (send(part, device) for part in self[:5])
        slot, row, position, cu_seq_lens, lengths = parts
        return Packed(slot, row, position, cu_seq_lens, lengths, self.max_length)


def send(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy a tensor to a device, from the CPU to a GPU without waiting for it."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def working_on(device: torch.device) -> AbstractContextManager[object]:
    """Make a GPU the current one.

    Triton's kernels, events and graphs belong to the current GPU, whichever their tensors are on.
    """
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def pack(attention_mask: torch.Tensor) -> Packed:
    """Find the real tokens of a `(batch, tokens)` mask, whichever side is padded."""
    mask = attention_mask.bool()
    lengths = mask.sum(dim=1)
    index = mask.flatten().nonzero().squeeze(1)
    position = (mask.cumsum(dim=1) - 1).flatten()[index]
    cu_seq_lens = nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
    # The width bounds the longest row without waiting for the device.
    return Packed(
        index, index // mask.shape[1], position, cu_seq_lens, lengths, attention_mask.shape[1]
    )


def pack_lengths(lengths: Sequence[int]) -> Packed:
    """Lay out rows of these lengths, on the CPU, as if padded on the right to the longest."""
    counts = torch.tensor(lengths, dtype=torch.long)
    row = torch.repeat_interleave(torch.arange(len(lengths)), counts)
    ends = counts.cumsum(0)
    position = torch.arange(len(row)) - (ends - counts)[row]
    longest = max(lengths, default=0)
    cu_seq_lens = nn.functional.pad(ends, (1, 0)).to(torch.int32)
    return Packed(row * longest + position, row, position, cu_seq_lens, counts, longest)


def can_pack(model: PreTrainedModel) -> bool:
    """Tell whether a backbone's attention is plain (windowed) causal attention throughout."""
    config = model.config
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    soft_capped = getattr(config, "attn_logit_softcapping", None) is not None
    supported = getattr(model, "_supports_attention_backend", False)
    return supported and not soft_capped and kinds <= {"full_attention", "sliding_attention"}


def run_packed(
    backbone: PreTrainedModel,
    embeddings: torch.Tensor,
    packed: Packed,
    position_ids: torch.Tensor,
) -> torch.Tensor:
    """Run a backbone over packed rows and return its last hidden states.

    Args:
        backbone: A decoder-only model without head, set to `PACKED_ATTENTION`.
        embeddings: `(T, hidden)`.
        packed: Where the rows begin and end.
        position_ids: `(T,)`.

    Returns:
        `(T, hidden)` states after the final norm.
    """
    output = backbone(
        inputs_embeds=embeddings[None],
        position_ids=position_ids[None],
        # A mask of four dimensions is passed through: building the real one would take the square
        # of all tokens. An empty one, so that attention which does not know packing fails.
        attention_mask=embeddings.new_ones((1, 1, 0, 0), dtype=torch.bool),
        use_cache=False,
        cu_seq_lens=packed.cu_seq_lens,
        max_seq_len=packed.max_length,
        # Chosen out here, because a compiled layer can't look for installed libraries.
        packed_kernel=_fused_attention() if embeddings.is_cuda else None,
    )
    return output.last_hidden_state[0]


def run_rows(
    backbone: PreTrainedModel,
    embeddings: torch.Tensor,
    packed: Packed,
    position_ids: torch.Tensor,
) -> torch.Tensor:
    """Do what `run_packed` does, by padding the rows for a backbone that can't be packed."""
    if backbone.config._attn_implementation == PACKED_ATTENTION:
        return run_packed(backbone, embeddings, packed, position_ids)
    shape = (len(packed.lengths), packed.max_length)
    slot = packed.row * packed.max_length + packed.position
    padded = embeddings.new_zeros((shape[0] * shape[1], embeddings.shape[-1]))
    positions = slot.new_zeros(shape).flatten().index_copy(0, slot, position_ids)
    output = backbone(
        inputs_embeds=padded.index_copy(0, slot, embeddings).view(*shape, -1),
        attention_mask=(
            torch.arange(shape[1], device=slot.device) < packed.lengths[:, None]
        ).long(),
        position_ids=positions.view(shape),
        use_cache=False,
    )
    return output.last_hidden_state.flatten(0, 1)[slot]


def packed_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    cu_seq_lens: torch.Tensor | None = None,
    max_seq_len: int | None = None,
    packed_kernel: Fused | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attend within each packed sequence; tensors are `(1, heads, T, head_dim)`.

    Returns:
        `(1, T, heads, head_dim)`, and None in the place of attention weights.
    """
    if cu_seq_lens is None or max_seq_len is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, **kwargs
        )
    q, k, v = (states[0].transpose(0, 1) for states in (query, key, value))  # (T, heads, dim)
    window = None if sliding_window is None or sliding_window >= max_seq_len else sliding_window
    if packed_kernel is not None and q.dtype in (torch.float16, torch.bfloat16):
        output = packed_kernel(q, k, v, cu_seq_lens, max_seq_len, scaling, window)
    else:
        output = _sequence_by_sequence(q, k, v, cu_seq_lens, scaling, window)
    return output[None], None


def packed_sequences(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seq_lens: torch.Tensor,
    max_length: int,
    scale: float,
) -> torch.Tensor:
    """Attend causally within packed sequences.

    Args:
        q: `(T, heads, head_dim)`.
        k: `(T, kv_heads, head_dim)`.
        v: As `k`.
        cu_seq_lens: `(sequences + 1,)` int32 borders.
        max_length: At least the longest sequence.
        scale: Of the scores.

    Returns:
        `(T, heads, head_dim)`.
    """
    kernel = _fused_attention() if q.is_cuda else None
    if kernel is not None and can_capture(q.dtype):
        return kernel(q, k, v, cu_seq_lens, max_length, scale, None)
    return _sequence_by_sequence(q, k, v, cu_seq_lens, scale, None)


def can_capture(dtype: torch.dtype) -> bool:
    """Tell whether packed attention on a GPU runs without asking for lengths on the CPU."""
    return dtype in (torch.float16, torch.bfloat16) and _fused_attention() is not None


@cache
def _fused_attention() -> Fused | None:
    """Choose flash-attn when installed, else torch's own variable-length kernel, else None."""
    try:
        from flash_attn import flash_attn_varlen_func
    except ImportError:
        pass
    else:

        def flash(
            q: torch.Tensor,
            k: torch.Tensor,
            v: torch.Tensor,
            borders: torch.Tensor,
            longest: int,
            scale: float | None,
            window: int | None,
        ) -> torch.Tensor:
            left = -1 if window is None else window - 1
            return flash_attn_varlen_func(
                q, k, v, borders, borders, longest, longest,
                softmax_scale=scale, causal=True, window_size=(left, 0),
            )  # fmt: skip

        return flash
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    # The signature is young: causality was a flag before it was a window (0, in torch 2.10), and
    # grouped heads got a flag in 2.13.
    known = frozenset(inspect.signature(varlen_attn).parameters)
    groups_heads = "enable_gqa" not in known and _groups_heads(varlen_attn)

    def varlen(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        borders: torch.Tensor,
        longest: int,
        scale: float | None,
        window: int | None,
    ) -> torch.Tensor:
        options: dict[str, Any] = {}
        groups = q.shape[1] // k.shape[1]
        if "enable_gqa" in known:
            options["enable_gqa"] = groups > 1
        elif groups > 1 and (torch.is_grad_enabled() or not groups_heads):
            k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        if "window_size" in known:
            options["window_size"] = (-1 if window is None else window - 1, 0)
        else:
            if window is not None:
                return _sequence_by_sequence(q, k, v, borders, scale, window)
            options["is_causal"] = True
        if "scale" in known:
            options["scale"] = scale
        elif scale is not None:
            # The kernel divides by sqrt(head_dim); fold another scale into the queries.
            q = q * (scale * q.shape[-1] ** 0.5)
        output: Any = varlen_attn(q, k, v, borders, borders, longest, longest, **options)
        return output

    return varlen


def _groups_heads(varlen_attn: Callable[..., Any]) -> bool:
    """Try whether a kernel without a flag for grouped heads takes them, in inference, all the same.

    torch 2.11's passes them on to flash attention, which shares key heads by itself.
    """
    if not torch.cuda.is_available():
        return False
    with torch.no_grad():
        q, k, v = (
            torch.randn(8, heads, 64, dtype=torch.bfloat16, device="cuda") for heads in (4, 2, 2)
        )
        borders = torch.tensor([0, 8], dtype=torch.int32, device="cuda")
        try:
            shared = varlen_attn(q, k, v, borders, borders, 8, 8)
        except (RuntimeError, ValueError):
            return False
        repeated = varlen_attn(
            q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1), borders, borders, 8, 8
        )
        return torch.allclose(shared, repeated, atol=0.02)


def _sequence_by_sequence(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seq_lens: torch.Tensor,
    scaling: float | None,
    window: int | None,
) -> torch.Tensor:
    """Attend to runs of equally long sequences, one after the other: any device and dtype."""
    output = torch.empty_like(q)
    start = 0
    lengths = cu_seq_lens.diff().tolist()
    for length, run in groupby(lengths):
        rows = len(list(run))
        span = slice(start, start + rows * length)
        start = span.stop
        if not length:
            continue
        q_s, k_s, v_s = (
            states[span].view(rows, length, *states.shape[1:]).transpose(1, 2)
            for states in (q, k, v)
        )  # (rows, heads, length, dim)
        mask = None
        if window is not None and length > window:
            position = torch.arange(length, device=q.device)
            distance = position[:, None] - position[None, :]
            mask = (distance >= 0) & (distance < window)
        attended = nn.functional.scaled_dot_product_attention(
            q_s, k_s, v_s, attn_mask=mask, is_causal=mask is None, scale=scaling,
            enable_gqa=q_s.shape[1] != k_s.shape[1],
        )  # fmt: skip
        output[span] = attended.transpose(1, 2).flatten(0, 1)
    return output


AttentionInterface.register(PACKED_ATTENTION, packed_attention)
AttentionMaskInterface.register(PACKED_ATTENTION, sdpa_mask)
