"""A Hugging Face backbone's own weights behind a forward pass of a few operations per layer.

The weights stay where they are: what is fused (queries, keys and values; gate and up) becomes one
tensor, and the model's parameters become views of it. It knows no caches and no prompts.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import nn

from softrag.fused import reference
from softrag.packing import packed_sequences

# Families whose layers are norm, attention, norm, gated MLP, and nothing else.
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
# Rotary embeddings whose frequencies do not depend on the length of what is read.
FIXED_ROPE = ("default", "linear", "llama3", "yarn")

# Tokens of a pass from which on states cost more than weights.
MANY_TOKENS = 1024

# (layer number, its queries, keys and values (T, ...)) -> (T, heads * head_dim)
Attend = Callable[[int, torch.Tensor], torch.Tensor]


class Layer(NamedTuple):
    """One layer's weights; biases and the norms of queries and keys may be None."""

    input_norm: torch.Tensor
    qkv: torch.Tensor
    qkv_bias: torch.Tensor | None
    q_norm: torch.Tensor | None
    k_norm: torch.Tensor | None
    out: torch.Tensor
    out_bias: torch.Tensor | None
    mlp_norm: torch.Tensor
    gate_up: torch.Tensor
    gate_up_bias: torch.Tensor | None
    down: torch.Tensor
    down_bias: torch.Tensor | None


class States(NamedTuple):
    """What a forward pass returns, both `(T, hidden)`: after the final norm, and halfway."""

    last: torch.Tensor
    middle: torch.Tensor


def why_not_fused(backbone: Any) -> str | None:  # noqa: ANN401 - published types know no layers
    """Return why a backbone can't run fused, as a clause, or None when it can."""
    config = backbone.config
    if config.model_type not in FAMILIES:
        return f"{config.model_type} is not one of {', '.join(FAMILIES)}"
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None) or []
    slides = "sliding_attention" in kinds if kinds else True
    if window is not None and slides and window < config.max_position_embeddings:
        return f"its attention slides over a window of {window} tokens"
    if config.hidden_act not in ("silu", "swish"):
        return f"its activation is {config.hidden_act}"
    rope = backbone.rotary_emb.rope_type
    if rope not in FIXED_ROPE:
        return f"its rotary embedding is {rope}"
    weight = backbone.layers[0].input_layernorm.weight
    if weight.is_cuda and backbone.layers[0].self_attn.head_dim not in (16, 32, 64, 128, 256):
        return f"its heads are {backbone.layers[0].self_attn.head_dim} wide"
    for name, module in backbone.layers.named_modules():
        if isinstance(module, nn.Linear):
            if module.weight.dtype != weight.dtype:
                return f"{name} is {module.weight.dtype}, the norms are {weight.dtype}"
        elif hasattr(module, "weight") and name.endswith("_proj"):
            return f"{name} is a {type(module).__name__}, not a plain linear layer"
    return None


class FusedBackbone:
    """Runs rows of tokens through a backbone; attention over a cache is given by the caller.

    Args:
        backbone: A model without head that `why_not_fused` has nothing against, on its device.
            Its weights must not be replaced afterwards.
    """

    def __init__(self, backbone: Any) -> None:  # noqa: ANN401
        config = backbone.config
        attention = backbone.layers[0].self_attn
        self.heads: int = config.num_attention_heads
        self.kv_heads: int = config.num_key_value_heads
        self.head_dim: int = attention.head_dim
        self.hidden: int = config.hidden_size
        self.scale: float = attention.scaling
        self.eps: float = config.rms_norm_eps
        self.max_length: int = config.max_position_embeddings
        self.layers = [_fuse(layer) for layer in backbone.layers]
        self.norm: torch.Tensor = backbone.norm.weight
        self.device = self.norm.device
        self.dtype = self.norm.dtype
        self.ops = _operations(self.device)
        self.table = _rotations(backbone.rotary_emb, self.max_length, self.device)

    @torch.no_grad()
    def forward(self, x: torch.Tensor, attend: Attend) -> States:
        """Run all layers and the final norm over `(T, hidden)`."""
        linear = nn.functional.linear
        stream = _Stream(x, self.ops, self.eps)
        middle = None
        for number, layer in enumerate(self.layers):
            normed = stream.normed(layer.input_norm)
            if number == len(self.layers) // 2:
                middle = stream.state()
            attended = attend(number, linear(normed, layer.qkv, layer.qkv_bias))
            stream.add(attended, layer.out, layer.out_bias)
            gate_up = linear(stream.normed(layer.mlp_norm), layer.gate_up, layer.gate_up_bias)
            stream.add(self.ops.silu_mul(gate_up), layer.down, layer.down_bias)
        assert middle is not None
        return States(stream.normed(self.norm), middle)

    def rotate(
        self,
        number: int,
        qkv: torch.Tensor,
        positions: torch.Tensor,
        keys: torch.Tensor | None = None,
        values: torch.Tensor | None = None,
        slots: torch.Tensor | None = None,
    ) -> None:
        """Rotate a layer's queries and keys in place; see `reference.rotate`."""
        layer = self.layers[number]
        self.ops.rotate(
            qkv, positions, self.table, layer.q_norm, layer.k_norm, self.eps,
            self.heads, self.kv_heads, keys, values, slots,
        )  # fmt: skip

    def attend_packed(
        self, qkv: torch.Tensor, cu_seq_lens: torch.Tensor, max_length: int
    ) -> torch.Tensor:
        """Attend causally within packed sequences of rotated `(T, ...)` states."""
        q, k, v = reference.split_heads(qkv, self.heads, self.kv_heads)
        return packed_sequences(q, k, v, cu_seq_lens, max_length, self.scale).flatten(1)

    def run_packed(
        self,
        embeddings: torch.Tensor,
        cu_seq_lens: torch.Tensor,
        max_length: int,
        positions: torch.Tensor,
    ) -> torch.Tensor:
        """Run packed sequences without a cache.

        Args:
            embeddings: `(T, hidden)`.
            cu_seq_lens: `(sequences + 1,)` int32 borders.
            max_length: At least the longest sequence.
            positions: `(T,)`.

        Returns:
            `(T, hidden)` states after the final norm.
        """

        def attend(number: int, qkv: torch.Tensor) -> torch.Tensor:
            self.rotate(number, qkv, positions)
            return self.attend_packed(qkv, cu_seq_lens, max_length)

        return self.forward(embeddings, attend).last


class _Stream:
    """The residual stream of a forward pass.

    Args:
        x: `(T, hidden)` that it starts with.
        ops: Has `add_norm`.
        eps: Of the norms.
    """

    def __init__(self, x: torch.Tensor, ops: ModuleType, eps: float) -> None:
        self._ops, self._eps = ops, eps
        # Of many tokens, a product is added where it is made: one reading and one writing of all
        # states less than adding it before the norm. Few tokens cost next to nothing beside the
        # weights.
        self._in_place = len(x) >= MANY_TOKENS
        self._total = x.clone() if self._in_place else None
        self._added: torch.Tensor | None = None if self._in_place else x

    def normed(self, weight: torch.Tensor) -> torch.Tensor:
        """Return the stream, normalized."""
        if self._added is None:
            assert self._total is not None
            return self._ops.add_norm(self._total, None, weight, self._eps)[0]
        out, self._total = self._ops.add_norm(self._added, self._total, weight, self._eps)
        return out

    def add(self, states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        """Add a linear layer's output; the next to be called is `normed`."""
        if not self._in_place:
            self._added = nn.functional.linear(states, weight, bias)
            return
        assert self._total is not None
        self._total.addmm_(states, weight.t())
        if bias is not None:
            self._total += bias

    def state(self) -> torch.Tensor:
        """Return the stream as it was when last normalized."""
        assert self._total is not None
        return self._total.clone() if self._in_place else self._total


def _operations(device: torch.device) -> ModuleType:
    if device.type != "cuda":
        return reference
    from softrag.fused import kernels

    return kernels


@torch.no_grad()
def _fuse(layer: Any) -> Layer:  # noqa: ANN401
    attention, mlp = layer.self_attn, layer.mlp
    qkv, qkv_bias = _join([attention.q_proj, attention.k_proj, attention.v_proj])
    gate_up, gate_up_bias = _join([mlp.gate_proj, mlp.up_proj])
    return Layer(
        input_norm=layer.input_layernorm.weight,
        qkv=qkv,
        qkv_bias=qkv_bias,
        q_norm=attention.q_norm.weight if hasattr(attention, "q_norm") else None,
        k_norm=attention.k_norm.weight if hasattr(attention, "k_norm") else None,
        out=attention.o_proj.weight,
        out_bias=attention.o_proj.bias,
        mlp_norm=layer.post_attention_layernorm.weight,
        gate_up=gate_up,
        gate_up_bias=gate_up_bias,
        down=mlp.down_proj.weight,
        down_bias=mlp.down_proj.bias,
    )


def _join(linears: list[nn.Linear]) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Put linear layers of one input into one weight, of which theirs become views."""
    weights = [linear.weight.data for linear in linears]
    sizes = [len(weight) for weight in weights]
    weight = _whole(weights)
    if weight is None:
        weight = torch.cat(weights)
    for linear, part in zip(linears, weight.split(sizes), strict=True):
        linear.weight.data = part
    biases = [linear.bias for linear in linears if linear.bias is not None]
    return weight, torch.cat([bias.data for bias in biases]) if biases else None


def _whole(parts: list[torch.Tensor]) -> torch.Tensor | None:
    """Return the tensor that parts are consecutive views of, if they are: joined before."""
    first, end = parts[0], parts[0].data_ptr()
    for part in parts:
        if part.data_ptr() != end or not part.is_contiguous():
            return None
        if part.untyped_storage().data_ptr() != first.untyped_storage().data_ptr():
            return None
        end += part.numel() * part.element_size()
    return first.as_strided((sum(map(len, parts)), first.shape[1]), first.stride())


def _rotations(rotary: Any, length: int, device: torch.device) -> torch.Tensor:  # noqa: ANN401
    """Return cosines and sines of all positions, `(length, head_dim)` float32."""
    positions = torch.arange(length, device=device)[None]
    cos, sin = rotary(torch.zeros(1, device=device), positions)
    half = cos.shape[-1] // 2
    return torch.cat([cos[0, :, :half], sin[0, :, :half]], dim=-1).contiguous()
