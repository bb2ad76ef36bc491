"""Tensors as base64 text; see `mmjax.multimodal.wire`."""

from mmjax.multimodal.wire import base642tensor, tensor2base64

__all__ = ["base642tensor", "tensor2base64"]
