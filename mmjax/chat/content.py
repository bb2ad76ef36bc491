"""Whether a template expects a message's content as a string or as a list of parts, from its syntax tree.

A template that loops over the content of a message expects parts. The analysis follows what each name may refer to (the
list of messages, one message, or one message's content or tool calls) through assignments, loops and macros, up to a
fixed point. A loop over what may be tool calls is about these: Mistral's templates take them from the content where a
message has them there.
"""

import functools
from collections import defaultdict
from collections.abc import Iterator

from jinja2 import nodes

from mmjax.chat.sandbox import UNPARSABLE, environment

MESSAGES, MESSAGE, CONTENT, TOOL_CALLS = "messages", "message", "content", "tool_calls"
Referents = frozenset[str]
NOTHING: Referents = frozenset()


@functools.lru_cache(maxsize=64)
def content_format(template: str) -> str:
    """ "openai" for a template that loops over message contents, else "string"; "string" if it cannot be parsed."""
    try:
        return "openai" if _TemplateAnalysis(environment().parse(template)).loops_over_content() else "string"
    except UNPARSABLE:
        return "string"


class _TemplateAnalysis:
    """Finds what each name in a template may refer to."""

    def __init__(self, tree: nodes.Template) -> None:
        self.tree = tree
        self.names: defaultdict[str, set[str]] = defaultdict(set)
        self.names["messages"].add(MESSAGES)
        self.macros = {macro.name: [arg.name for arg in macro.args] for macro in tree.find_all(nodes.Macro)}

    def loops_over_content(self) -> bool:
        size = -1
        while size != (size := sum(map(len, self.names.values()))):
            for name, referents in self._bindings():
                self.names[name] |= referents
        iterated = (self._referents(loop.iter) for loop in self.tree.find_all(nodes.For))
        return any(CONTENT in referents and TOOL_CALLS not in referents for referents in iterated)

    def _bindings(self) -> Iterator[tuple[str, Referents]]:
        """(name, what it may refer to) for every binding."""
        for assign in self.tree.find_all(nodes.Assign):
            name = _name(assign.target)
            yield name, self._referents(assign.node)
            if isinstance(assign.node, nodes.Call):  # namespace(parts=message.content)
                for keyword in assign.node.kwargs:
                    yield f"{name}.{keyword.key}", self._referents(keyword.value)
        for loop in self.tree.find_all(nodes.For):
            if MESSAGES in self._referents(loop.iter):
                yield _name(loop.target), frozenset({MESSAGE})
        for call in self.tree.find_all(nodes.Call):
            arguments = self.macros.get(_name(call.node), [])
            for name, value in zip(arguments, call.args, strict=False):
                yield name, self._referents(value)
            for keyword in call.kwargs:
                if keyword.key in arguments:
                    yield keyword.key, self._referents(keyword.value)

    def _referents(self, node: nodes.Expr | nodes.Node | None) -> Referents:
        """What an expression may evaluate to."""
        if isinstance(node, nodes.Name):
            return frozenset(self.names.get(node.name, ()))
        if isinstance(node, nodes.CondExpr):
            return self._referents(node.expr1) | self._referents(node.expr2)
        if isinstance(node, (nodes.Or, nodes.And)):
            return self._referents(node.left) | self._referents(node.right)
        if isinstance(node, nodes.Filter):  # list, reverse, selectattr and the like pass on what they get
            referents = self._referents(node.node)
            return frozenset({MESSAGE}) if node.name in ("first", "last") and MESSAGES in referents else referents
        if isinstance(node, (nodes.Getattr, nodes.Getitem)):
            return self._member(node)
        return NOTHING

    def _member(self, node: nodes.Getattr | nodes.Getitem) -> Referents:
        key = node.attr if isinstance(node, nodes.Getattr) else node.arg
        if isinstance(key, nodes.Const):
            key = key.value
        owner = self._referents(node.node)
        found = set(self.names.get(_name(node), ()))
        if MESSAGE in owner:
            found |= {name for name in (CONTENT, TOOL_CALLS) if key == name}
        if MESSAGES in owner and isinstance(node, nodes.Getitem):
            found.add(MESSAGES if isinstance(key, nodes.Slice) else MESSAGE)
        if CONTENT in owner and isinstance(key, nodes.Slice):
            found.add(CONTENT)
        return frozenset(found)


def _name(node: nodes.Node) -> str:
    """A name, or namespace.attribute; "" for any other expression."""
    if isinstance(node, nodes.Name):
        return node.name
    if isinstance(node, nodes.NSRef):
        return f"{node.name}.{node.attr}"
    if isinstance(node, nodes.Getattr) and isinstance(node.node, nodes.Name):
        return f"{node.node.name}.{node.attr}"
    return ""
