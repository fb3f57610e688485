"""Llama-like backbones as a handful of fused operations per layer, for inference only."""

from softrag.fused.backbone import FusedBackbone, why_not_fused
from softrag.fused.packed import PackedRunner

__all__ = ["FusedBackbone", "PackedRunner", "why_not_fused"]
