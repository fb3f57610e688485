"""LoRA on a backbone through peft: add, recognise, merge. It knows nothing of softrag models."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from softrag.extras import load_extra


def add_lora(backbone: PreTrainedModel, *, r: int, alpha: int, dropout: float = 0.0) -> None:
    """Freeze a backbone and put trainable LoRA on all its linear layers (OSCAR, table 7).

    Args:
        backbone: A language model without its head; the head is never adapted.
        r: Rank.
        alpha: Scale numerator; updates are scaled by `alpha / r`.
        dropout: On the adapters' inputs, while training.
    """
    peft = load_extra("peft", extra="train", purpose="A checkpoint with adapters")
    config = peft.LoraConfig(
        r=r, lora_alpha=alpha, lora_dropout=dropout, target_modules="all-linear"
    )
    peft.inject_adapter_in_model(config, backbone)


def set_dropout(backbone: nn.Module, dropout: float) -> None:
    """Set the dropout on the inputs of a backbone's adapters."""
    layer: Any
    for layer in backbone.modules():
        if is_adapted(layer):
            for name in layer.lora_dropout:
                layer.lora_dropout[name] = nn.Dropout(dropout) if dropout else nn.Identity()


def is_lora_weight(name: str) -> bool:
    """Tell whether a parameter of this name belongs to an adapter."""
    return ".lora_A." in name or ".lora_B." in name


def is_adapted(layer: nn.Module) -> bool:
    """Tell whether a layer is a base layer with adapters around it."""
    return hasattr(layer, "lora_A") and hasattr(layer, "get_base_layer")


@contextmanager
def multiplying_once(model: nn.Module) -> Iterator[None]:
    """Let adapted layers add up their weights first, and then multiply once instead of thrice.

    The same function, for the training of layers without dropout. Adding is little beside products
    with thousands of tokens, and narrow products are what a GPU is slowest at.
    """
    layers = [layer for layer in model.modules() if is_adapted(layer)]
    for layer in layers:
        layer.forward = MethodType(_multiply_once, layer)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _multiply_once(layer: Any, states: torch.Tensor) -> torch.Tensor:  # noqa: ANN401
    base = layer.get_base_layer()
    weight = base.weight
    for name, down in layer.lora_A.items():
        weight = weight + layer.scaling[name] * (layer.lora_B[name].weight @ down.weight)
    return nn.functional.linear(states, weight, base.bias)


@torch.no_grad()
def merged_weight(layer: Any) -> torch.Tensor:  # noqa: ANN401 - peft publishes no types
    """Return an adapted layer's weight with its adapters added, in the weight's own dtype."""
    weight = layer.get_base_layer().weight
    total = weight.float()
    for adapter in layer.lora_A:
        total = total + layer.get_delta_weight(adapter).float()
    return total.to(weight.dtype)


@torch.no_grad()
def merge_lora(backbone: nn.Module) -> int:
    """Replace every adapted layer by a plain one with the sum of the weights.

    The sum is a new tensor, so that another module tree over the same base weights keeps them.

    Returns:
        The number of merged layers.
    """
    merged = 0
    layer: Any
    for parent in list(backbone.modules()):
        for name, layer in list(parent.named_children()):
            if not is_adapted(layer):
                continue
            base = layer.get_base_layer()
            plain = nn.Linear(base.in_features, base.out_features, bias=False, device="meta")
            plain.weight = nn.Parameter(merged_weight(layer), requires_grad=False)
            if base.bias is not None:
                plain.bias = base.bias
            setattr(parent, name, plain)
            merged += 1
    return merged
