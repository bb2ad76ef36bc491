"""Encoding of tensors as base64 text; see `mmjax.multimodal.tensor_codec`."""

from mmjax.multimodal.tensor_codec import base642tensor, tensor2base64

__all__ = ["base642tensor", "tensor2base64"]
