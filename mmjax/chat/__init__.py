"""Turns conversations into prompts: reads messages and their media, and applies the chat template."""

from mmjax.chat.content import content_format
from mmjax.chat.conversation import split
from mmjax.chat.parts import UnknownPart
from mmjax.chat.renderer import ChatOptions, ChatRenderer, RenderedChat
from mmjax.chat.template import ChatTemplateResolutionError, StoredTemplates, load_template

__all__ = [
    "ChatOptions",
    "ChatRenderer",
    "ChatTemplateResolutionError",
    "RenderedChat",
    "StoredTemplates",
    "UnknownPart",
    "content_format",
    "load_template",
    "split",
]
