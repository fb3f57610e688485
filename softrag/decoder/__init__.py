"""Decoders: memories and a question in, an answer out. They know nothing of stores."""

from softrag.decoder.base import Decoder, DecodeRequest, DecodeResult
from softrag.decoder.torch import TorchDecoder
from softrag.decoder.vllm import VLLMDecoder

__all__ = ["DecodeRequest", "DecodeResult", "Decoder", "TorchDecoder", "VLLMDecoder"]
