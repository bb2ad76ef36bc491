"""Conversations: messages, their parts and the media in them -> a prompt, by the template of the model."""

from mmjax.chat.content import content_format
from mmjax.chat.conversation import split
from mmjax.chat.draft import Chat, ChatOptions, Draft
from mmjax.chat.parts import UnknownPart
from mmjax.chat.template import ChatTemplateResolutionError, Stored, load_template

__all__ = [
    "Chat",
    "ChatOptions",
    "ChatTemplateResolutionError",
    "Draft",
    "Stored",
    "UnknownPart",
    "content_format",
    "load_template",
    "split",
]
