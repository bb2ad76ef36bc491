"""Whether a template wants a message's content as a string or as a list of parts: read from its syntax tree.

A template that loops over the content of a message wants parts. What a name may hold is followed through assignments,
loops and macros until nothing new is learned: the list of messages, one message, or one message's content.
"""

import functools
from collections import defaultdict
from collections.abc import Iterator

from jinja2 import nodes

from mmjax.chat.sandbox import UNPARSABLE, environment

LIST, MESSAGE, CONTENT = "list", "message", "content"
Held = frozenset[str]
NOTHING: Held = frozenset()


@functools.lru_cache(maxsize=64)
def content_format(template: str) -> str:
    """ "openai" for a template that loops over message contents, else "string"; "string" if it cannot be parsed."""
    try:
        return "openai" if _Reading(environment().parse(template)).loops_over_content() else "string"
    except UNPARSABLE:
        return "string"


class _Reading:
    """What each name of a template may hold."""

    def __init__(self, tree: nodes.Template) -> None:
        self.tree = tree
        self.names: defaultdict[str, set[str]] = defaultdict(set)
        self.names["messages"].add(LIST)
        self.macros = {macro.name: [arg.name for arg in macro.args] for macro in tree.find_all(nodes.Macro)}

    def loops_over_content(self) -> bool:
        size = -1
        while size != (size := sum(map(len, self.names.values()))):
            for name, held in self._bindings():
                self.names[name] |= held
        return any(CONTENT in self._held(loop.iter) for loop in self.tree.find_all(nodes.For))

    def _bindings(self) -> Iterator[tuple[str, Held]]:
        """(name, what it is bound to) for every place that binds one."""
        for assign in self.tree.find_all(nodes.Assign):
            name = _name(assign.target)
            yield name, self._held(assign.node)
            if isinstance(assign.node, nodes.Call):  # namespace(parts=message.content)
                for keyword in assign.node.kwargs:
                    yield f"{name}.{keyword.key}", self._held(keyword.value)
        for loop in self.tree.find_all(nodes.For):
            if LIST in self._held(loop.iter):
                yield _name(loop.target), frozenset({MESSAGE})
        for call in self.tree.find_all(nodes.Call):
            arguments = self.macros.get(_name(call.node), [])
            for name, value in zip(arguments, call.args, strict=False):
                yield name, self._held(value)
            for keyword in call.kwargs:
                if keyword.key in arguments:
                    yield keyword.key, self._held(keyword.value)

    def _held(self, node: nodes.Expr | nodes.Node | None) -> Held:
        """What an expression may evaluate to."""
        if isinstance(node, nodes.Name):
            return frozenset(self.names.get(node.name, ()))
        if isinstance(node, nodes.CondExpr):
            return self._held(node.expr1) | self._held(node.expr2)
        if isinstance(node, (nodes.Or, nodes.And)):
            return self._held(node.left) | self._held(node.right)
        if isinstance(node, nodes.Filter):  # list, reverse, selectattr: what they yield is still the same kind
            held = self._held(node.node)
            return frozenset({MESSAGE}) if node.name in ("first", "last") and LIST in held else held
        if isinstance(node, (nodes.Getattr, nodes.Getitem)):
            return self._member(node)
        return NOTHING

    def _member(self, node: nodes.Getattr | nodes.Getitem) -> Held:
        key = node.attr if isinstance(node, nodes.Getattr) else node.arg
        if isinstance(key, nodes.Const):
            key = key.value
        held = self._held(node.node)
        found = set(self.names.get(_name(node), ()))
        if MESSAGE in held and key == "content":
            found.add(CONTENT)
        if LIST in held and isinstance(node, nodes.Getitem):
            found.add(LIST if isinstance(key, nodes.Slice) else MESSAGE)
        if CONTENT in held and isinstance(key, nodes.Slice):
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
