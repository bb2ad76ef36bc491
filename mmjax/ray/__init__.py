"""Replicas on Ray: the server as a Ray Serve deployment, and batch inference over a Ray Data dataset.

`pip install 'mmjax[ray]'`. Importing this package does not import Ray; its functions do.
"""

from mmjax.ray.data import EngineProcessorConfig, Processor, build_processor
from mmjax.ray.serve import build_openai_app, deployment

__all__ = ["EngineProcessorConfig", "Processor", "build_openai_app", "build_processor", "deployment"]
