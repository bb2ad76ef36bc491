"""Rules for imports, lengths, names, words, and what device code declares.

Imports are read from the syntax tree, so an import inside a function counts too. Each rule is also run on a planted
violation, to show that it can fail.
"""

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from mmjax.models import FAMILIES

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = {"mmjax": "mmjax", "converters": "mmjax.converters", "kernels": "mmjax.kernels", "serve": "mmjax.serve"}
OUTSIDE = ("tests", "benchmarks", "examples", "docs")

# From the bottom up. A package imports from itself and from lower layers, never from its own layer or above.
LAYERS = (
    ("types", "version"),
    ("config", "hf_config", "batch", "sharding", "spec", "tokenizer", "kernels", "converters", "parsers"),
    ("multimodal", "mel"),
    ("assets", "utils", "chat", "processors", "nn"),
    ("inputs", "models"),
    ("loader",),
    ("engine",),
    ("outputs", "distributed"),
    ("entrypoints",),
    ("demo", ""),  # "": the public names of the package itself, which are imported on demand
    ("serve",),
    ("cli",),
    ("ray",),
    ("__main__",),
)
LAYER_OF = {package: layer for layer, packages in enumerate(LAYERS) for package in packages}


@dataclass(frozen=True)
class ImportRule:
    """What a package may import of mmjax (None: all lower layers), and what it must not import of others."""

    ours: tuple[str, ...] | None = None
    banned: tuple[str, ...] = ()


DEVICE = ("jax", "jaxlib", "flax", "orbax")
NO_MODEL_CODE = ("flax", "orbax", "transformers")
HOST = ImportRule(banned=(*DEVICE, "transformers"))

# The longest matching prefix decides. `may_import` also checks that a family does not import another one.
IMPORT_RULES = {
    "": ImportRule(),
    "kernels": ImportRule(ours=("kernels",), banned=NO_MODEL_CODE),
    "converters": ImportRule(ours=("converters",), banned=(*DEVICE, "transformers")),
    "converters.orbax": ImportRule(ours=("converters",), banned=("flax", "transformers")),
    "types": HOST,
    "config": HOST,
    "hf_config": HOST,
    "spec": HOST,
    "mel": HOST,
    "multimodal": HOST,
    "assets": HOST,
    "parsers": ImportRule(ours=("parsers",), banned=(*DEVICE, "transformers")),
    "utils": ImportRule(ours=("multimodal",), banned=(*DEVICE, "transformers")),
    "tokenizer": ImportRule(banned=DEVICE),
    "chat": HOST,
    "processors": HOST,
    "inputs": HOST,
    "outputs": HOST,
    "batch": ImportRule(ours=(), banned=NO_MODEL_CODE),
    "sharding": ImportRule(ours=(), banned=NO_MODEL_CODE),
    "nn": ImportRule(
        ours=("nn", "kernels", "batch", "sharding", "spec", "hf_config", "mel"), banned=("orbax", "transformers")
    ),
    "models": ImportRule(
        ours=("models", "nn", "processors", "batch", "sharding", "spec", "hf_config", "mel"),
        banned=("orbax", "transformers"),
    ),
    "engine": HOST,
    "engine.model_runner": ImportRule(banned=("orbax", "transformers")),
    "engine.programs": ImportRule(banned=("orbax", "transformers")),
    "engine.layouts": ImportRule(banned=NO_MODEL_CODE),
    "engine.program_cache": ImportRule(banned=("orbax", "transformers")),
    "engine.sampler": ImportRule(banned=("orbax", "transformers")),
    "distributed": ImportRule(banned=NO_MODEL_CODE),
    "engine.compile_counter": ImportRule(banned=NO_MODEL_CODE),
    "ray": HOST,
    "serve": ImportRule(ours=("serve", "parsers", "types", "*"), banned=(*DEVICE, "transformers")),
}
NO_FAMILY = ("engine", "inputs", "outputs", "loader", "entrypoints", "chat")  # packages that treat all families alike

DEVICE_CODE = ("kernels", "mmjax/nn", "mmjax/models")
ARRAYS = ("Array", "jax.Array", "jnp.ndarray", "np.ndarray")

FILE_LINES = 500
FUNCTION_LINES = 60
PARAMETERS = 8
FAMILY_LINES = {"models": 350, "processors": 350, "converters": 60}
# functions whose parameters are those of vLLM or OpenAI
PUBLIC = {"mmjax/entrypoints/llm.py": {"chat"}}
# what a model may import from processors: constants, and the declarations of its encoder's fields
DECLARED = re.compile(r"processors\.\w+\.([A-Z0-9_]+|\w+_fields)")
# vague names that scripts import from vLLM
MIRRORS = ("mmjax/utils/__init__.py", "mmjax/utils/serial_utils.py", "mmjax/multimodal/utils.py")
VAGUE = re.compile(r"(^|_)(utils?|commons?|helpers?|managers?|handlers?|misc)(_|$)")


def sources(root: Path, *folders: str) -> Iterator[Path]:
    for folder in folders:
        yield from sorted((root / folder).rglob("*.py"))


def dotted(path: Path, root: Path) -> str:
    """The module of a file: kernels/kv_cache.py is mmjax.kernels.kv_cache."""
    first, *rest = path.relative_to(root).with_suffix("").parts
    return ".".join([PACKAGES[first], *(part for part in rest if part != "__init__")])


def imports(tree: ast.AST, module: str, package: bool) -> Iterator[tuple[int, str]]:
    """(line, dotted target) of every import; `from a import b` gives a.b, and a relative one is resolved."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for name in node.names:
                yield node.lineno, name.name
        elif isinstance(node, ast.ImportFrom):
            base = module.split(".")
            up = node.level - package
            start = ".".join(base[: len(base) - up]) + "." if node.level else ""
            for name in node.names:
                yield node.lineno, f"{start}{node.module or ''}.{name.name}".replace("..", ".")
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            yield from ((node.lineno, str(name.value)) for name in node.args[:1] if isinstance(name, ast.Constant))


def within(name: str, prefixes: tuple[str, ...]) -> bool:
    return any(name == prefix or name.startswith(f"{prefix}.") for prefix in prefixes)


def rule_of(package: str) -> ImportRule:
    return IMPORT_RULES[max((key for key in IMPORT_RULES if not key or within(package, (key,))), key=len)]


def import_faults(root: Path) -> Iterator[str]:
    for path in sources(root, *PACKAGES):
        module = dotted(path, root)
        package = module.removeprefix("mmjax").removeprefix(".")
        rule, tree = rule_of(package), ast.parse(path.read_text())
        eager = {node.lineno for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)}
        for line, target in imports(tree, module, path.name == "__init__.py"):
            where = f"{path.relative_to(root)}:{line} imports {target}"
            top, _, inner = target.partition(".")
            if top in PACKAGES and top != "mmjax":
                yield f"{where}: say mmjax.{top}"
            elif top == "torch":
                yield f"{where}: torch is for tests"
            elif top == "transformers" and line in eager:
                yield f"{where}: 5 s at import; import it where it is used"
            elif within(target, rule.banned):
                yield f"{where}: not in {package}"
            elif top == "mmjax" and not may_import(package, rule, inner):
                yield f"{where}: {package or 'mmjax'} may not import that"


def package_of(inner: str) -> str:
    """The top-level package of a module, or "" for a public name of mmjax."""
    top = inner.partition(".")[0]
    return top if top in LAYER_OF else ""


def may_import(package: str, rule: ImportRule, inner: str) -> bool:
    folder, _, family = package.partition(".")
    if folder in FAMILY_LINES and family in FAMILIES.values():
        others = tuple(f"{f}.{other}" for f in FAMILY_LINES for other in FAMILIES.values() if other != family)
        if within(inner, others):
            return False
    if folder == "models" and within(inner, ("processors",)) and not DECLARED.fullmatch(inner):
        return False
    if within(package, NO_FAMILY) and within(inner, tuple(f"{f}.{n}" for f in FAMILY_LINES for n in FAMILIES.values())):
        return False
    if (
        package_of(inner) != package_of(package)
        and LAYER_OF[package_of(inner)] >= LAYER_OF[package_of(package)]
        and package
    ):
        return False
    public = "*" in (rule.ours or ()) and "." not in inner and (inner[:1].isupper() or inner == "__version__")
    return rule.ours is None or public or within(inner, rule.ours)


def length_faults(root: Path) -> Iterator[str]:
    for path in sources(root, *PACKAGES, *OUTSIDE):
        name, text = path.relative_to(root), path.read_text()
        folder, limit = path.parent.name, FILE_LINES
        if path.stem in FAMILIES.values() and not within(name.parts[0], OUTSIDE):
            limit = FAMILY_LINES.get(folder, limit)
        if (lines := text.count("\n")) > limit:
            yield f"{name}: {lines} lines, at most {limit}"
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                if lines > FUNCTION_LINES:
                    yield f"{name}:{node.lineno}: {node.name} has {lines} lines, at most {FUNCTION_LINES}"


def parameter_faults(root: Path) -> Iterator[str]:
    for path in sources(root, *PACKAGES):
        name = path.relative_to(root)
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name not in PUBLIC.get(str(name), ()):
                arguments = (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)
                count = sum(argument.arg not in ("self", "cls") for argument in arguments)
                pallas = name.parts[0] == "kernels"  # one parameter for every array
                if count > PARAMETERS and not pallas:
                    yield f"{name}:{node.lineno}: {node.name} takes {count} parameters, at most {PARAMETERS}"


def name_faults(root: Path) -> Iterator[str]:
    for path in sources(root, *PACKAGES, *OUTSIDE):
        for part in path.relative_to(root).with_suffix("").parts:
            if VAGUE.search(part) and str(path.relative_to(root)) not in MIRRORS:
                yield f"{path.relative_to(root)}: {part!r} names nothing"


def word_faults(root: Path) -> Iterator[str]:
    unfinished = re.compile(r"#.*\b(TO" + r"DO|FIX" + r"ME|XX" + r"X)\b")
    environment = re.compile(r"\bos\.(environ(?!\.setdefault)|getenv)\b")
    for path in sources(root, *PACKAGES, *OUTSIDE):
        name = path.relative_to(root)
        for number, line in enumerate(path.read_text().splitlines(), 1):
            if unfinished.search(line):
                yield f"{name}:{number}: unfinished work"
            if environment.search(line) and name.parts[0] in PACKAGES and str(name) != "mmjax/config.py":
                yield f"{name}:{number}: only mmjax/config.py reads the environment"


def array_faults(root: Path) -> Iterator[str]:
    """Arrays are annotated by jaxtyping, with dtype and axes: Float[Array, "T D"]. `Array` alone says neither."""
    for path in sources(root, *DEVICE_CODE):
        tree = ast.parse(path.read_text())
        shaped = {
            node.slice.elts[0]
            for node in ast.walk(tree)
            if isinstance(node, ast.Subscript)
            and isinstance(node.slice, ast.Tuple)
            and isinstance(node.slice.elts[-1], ast.Constant)
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.Name | ast.Attribute) and node not in shaped and ast.unparse(node) in ARRAYS:
                yield f"{path.relative_to(root)}:{node.lineno}: {ast.unparse(node)} without dtype and axes"


def scope_faults(root: Path) -> Iterator[str]:
    """The `__call__` of a module opens a jax.named_scope, unless all it does is to call another module."""
    for path in sources(root, *DEVICE_CODE):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.FunctionDef) or node.name != "__call__":
                continue
            statements = [statement for statement in node.body if not isinstance(statement, ast.Expr)]
            if len(statements) > 1 and "named_scope" not in ast.unparse(node):
                yield f"{path.relative_to(root)}:{node.lineno}: __call__ opens no jax.named_scope"


CHECKS = {
    "arrays": array_faults,
    "scopes": scope_faults,
    "imports": import_faults,
    "lengths": length_faults,
    "parameters": parameter_faults,
    "names": name_faults,
    "words": word_faults,
}


@pytest.mark.parametrize("check", CHECKS)
def test_house_rule(check: str) -> None:
    assert list(CHECKS[check](ROOT)) == []


BODY = "def f():\n" + "    pass\n" * 60
MANY = "def f(" + ", ".join("abcdefghi") + "): pass"
PLANTED = [
    ("imports", "kernels/kv_cache.py", "import mmjax.batch", "may not import"),
    ("imports", "kernels/deep/reference.py", "from ...nn import rope", "may not import"),
    ("imports", "kernels/kv_cache.py", "import flax.nnx", "not in kernels"),
    ("imports", "converters/llava.py", "import jax.numpy as jnp", "not in converters"),
    ("imports", "converters/llava.py", "from mmjax.converters.whisper import TABLE", "may not import"),
    ("imports", "mmjax/types/errors.py", "from mmjax.entrypoints import llm", "may not import"),
    ("imports", "mmjax/multimodal/image.py", "def f():\n    import jax", "not in multimodal"),
    ("imports", "mmjax/processors/llava.py", "from flax import nnx", "not in processors"),
    ("imports", "mmjax/processors/llava.py", "from . import whisper", "may not import"),
    ("imports", "mmjax/nn/rope.py", "from mmjax.models import base", "may not import"),
    ("imports", "mmjax/models/llava.py", "from mmjax.models.whisper import Block", "may not import"),
    ("imports", "mmjax/models/llava.py", "from mmjax.inputs import parse", "may not import"),
    ("imports", "mmjax/models/llava.py", "from mmjax.processors.phi3_v import crop_fields", "may not import"),
    ("imports", "mmjax/models/llava.py", "from mmjax.processors.llava import Processor", "may not import"),
    ("imports", "mmjax/nn/rope.py", "from mmjax.processors.qwen_vl import patch_fields", "may not import"),
    ("imports", "mmjax/engine/scheduler.py", "import jax", "not in engine.scheduler"),
    ("imports", "mmjax/engine/scheduler.py", "from mmjax.processors.llava import Processor", "may not import"),
    ("imports", "mmjax/engine/scheduler.py", "from mmjax.outputs import completion", "may not import"),
    ("imports", "mmjax/engine/scheduler.py", "def f():\n    from mmjax.entrypoints import llm", "may not import"),
    ("imports", "mmjax/engine/model_runner.py", "from mmjax.models import llava", "may not import"),
    ("imports", "mmjax/inputs/input_processor.py", "import jax", "not in inputs"),
    ("imports", "mmjax/inputs/parse.py", "from mmjax.loader import checkpoint", "may not import"),
    ("imports", "mmjax/chat/renderer.py", "from mmjax.processors import base", "may not import"),
    ("imports", "mmjax/entrypoints/llm.py", "from mmjax.serve import app", "may not import"),
    ("imports", "mmjax/entrypoints/llm.py", "import kernels", "say mmjax.kernels"),
    ("imports", "mmjax/entrypoints/llm.py", "from converters.table import Rule", "say mmjax.converters"),
    (
        "imports",
        "mmjax/entrypoints/llm.py",
        "import importlib\nimportlib.import_module('serve.app')",
        "say mmjax.serve",
    ),
    ("imports", "mmjax/entrypoints/llm.py", "def f():\n    import torch", "torch is for tests"),
    ("imports", "mmjax/tokenizer/tokenizer.py", "import transformers", "import it where it is used"),
    ("imports", "serve/app.py", "from mmjax.engine import scheduler", "may not import"),
    ("lengths", "mmjax/entrypoints/llm.py", "x = 1\n" * 501, "501 lines"),
    ("lengths", "mmjax/entrypoints/llm.py", BODY, "f has 61 lines"),
    ("lengths", "mmjax/processors/llava.py", "x = 1\n" * 351, "351 lines"),
    ("lengths", "mmjax/models/llava.py", "x = 1\n" * 351, "351 lines"),
    ("lengths", "converters/llava.py", "x = 1\n" * 61, "61 lines"),
    ("parameters", "mmjax/entrypoints/llm.py", MANY, "9 parameters"),
    ("names", "mmjax/utils.py", "", "names nothing"),
    ("names", "mmjax/common/cache_helpers.py", "", "names nothing"),
    ("names", "mmjax/utils/media_utils.py", "", "names nothing"),
    ("imports", "mmjax/utils/serial_utils.py", "from mmjax.engine import engine", "may not import"),
    ("arrays", "mmjax/nn/rope.py", "def f(x: jax.Array) -> None: pass", "jax.Array without dtype and axes"),
    ("arrays", "mmjax/models/llava.py", "def f() -> Array | None: pass", "Array without dtype and axes"),
    ("arrays", "kernels/tile.py", "State = tuple[Array, np.ndarray]", "without dtype and axes"),
    (
        "scopes",
        "mmjax/nn/norm.py",
        "class Norm:\n    def __call__(self, x):\n        y = x + 1\n        return y",
        "__call__ opens no jax.named_scope",
    ),
    ("words", "mmjax/entrypoints/llm.py", "x = 1  # TO" + "DO: later", "unfinished"),
    ("words", "mmjax/entrypoints/llm.py", "import os\nos.environ['X']", "only mmjax/config.py"),
]


@pytest.mark.parametrize(("check", "file", "text", "fault"), PLANTED)
def test_house_rule_catches(check: str, file: str, text: str, fault: str, tmp_path: Path) -> None:
    planted = tmp_path / file
    planted.parent.mkdir(parents=True)
    planted.write_text(text)
    found = list(CHECKS[check](tmp_path))
    assert found and all(fault in line for line in found)


ALLOWED = [
    ("mmjax/nn/norm.py", 'def f(x: Float[Array, "T D"]) -> tuple[Float32[np.ndarray, "T"], ...]: pass'),
    ("mmjax/nn/norm.py", "class Norm:\n    def __call__(self, x):\n        return self.inner(x)"),
    ("kernels/deep/reference.py", "from ..choose import select\nimport jax"),
    ("converters/orbax.py", "import jax, orbax.checkpoint"),
    ("mmjax/models/llava.py", "from mmjax.spec import EncoderSpec\nfrom mmjax.nn.encoder import Encoder"),
    ("mmjax/models/llava.py", "from mmjax.processors.llava import PAD, image_fields"),
    ("mmjax/engine/model_runner.py", "import jax\nfrom mmjax.spec import ModelSpec"),
    ("mmjax/outputs/completion.py", "from mmjax.engine.sequence import EngineSequence"),
    ("mmjax/tokenizer/tokenizer.py", "def f():\n    from transformers import AutoTokenizer"),
    ("mmjax/config.py", "import os\nos.environ['X']"),
    ("mmjax/cli/main.py", "from mmjax.serve import command"),
    ("serve/app.py", "from mmjax import LLM\nfrom mmjax.types import RequestError"),
]


@pytest.mark.parametrize(("file", "text"), ALLOWED)
def test_house_rule_allows(file: str, text: str, tmp_path: Path) -> None:
    planted = tmp_path / file
    planted.parent.mkdir(parents=True)
    planted.write_text(text)
    assert [fault for check in CHECKS.values() for fault in check(tmp_path)] == []
