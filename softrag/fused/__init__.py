"""Llama-like backbones as a handful of fused operations per layer, for inference only."""

from softrag.fused.backbone import FusedBackbone, why_not_fused

__all__ = ["FusedBackbone", "why_not_fused"]
