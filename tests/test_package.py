"""The installed package: all its folders, nothing heavy at import, and the same names however it is installed."""

import ast
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest

import mmjax
from test_house import PACKAGES, ROOT, dotted, imports, sources

PYPROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
# Not imported by name: starlette needs it to parse forms.
BEHIND_OTHERS = {"python-multipart", "flatbuffers"}
TOP_LEVEL = {"mmjax", "converters", "kernels", "serve", "tests", "benchmarks", "examples", "docs"}

# Imports every package, and prints the file of each.
PROBE = """
import json, mmjax, mmjax.kernels, mmjax.converters.table, mmjax.serve
from mmjax.kernels import paged_decode
from mmjax.converters.whisper import TABLE
import mmjax.converters.whisper
print(json.dumps([m.__file__ for m in (mmjax, mmjax.kernels, mmjax.converters.whisper, mmjax.serve)]))
"""


def python(code: str, *, cwd: Path, path: Path | None = None) -> str:
    """The output of a new interpreter with the installed packages but no editable install; stderr if it fails."""
    installed = [entry for entry in sys.path if entry.endswith("-packages")]
    env = os.environ | {"PYTHONPATH": os.pathsep.join([*([str(path)] if path else []), *installed])}
    result = subprocess.run(
        [sys.executable, "-S", "-c", code], cwd=cwd, env=env, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_every_package_is_listed() -> None:
    tool = PYPROJECT["tool"]["setuptools"]
    folders = {path.parent for path in sources(ROOT, *PACKAGES)}
    packages = {dotted(folder / "__init__.py", ROOT) for folder in folders}
    assert set(tool["packages"]) == packages
    assert tool["package-dir"] == {module: folder for folder, module in PACKAGES.items()}


def test_every_package_has_an_init() -> None:
    bare = {path.parent for path in sources(ROOT, *PACKAGES) if not (path.parent / "__init__.py").is_file()}
    assert bare == set()


def test_every_data_file_is_listed() -> None:
    patterns = {f"{package}/{name}" for package, names in package_data().items() for name in names}
    files = (path for package in PACKAGES for path in (ROOT / package).rglob("*") if path.is_file())
    found = {data_name(path) for path in files if path.suffix not in (".py", ".pyc")}
    assert {name for name in found if not any(fnmatch(name, pattern) for pattern in patterns)} == set()
    assert {pattern for pattern in patterns if not any(fnmatch(name, pattern) for name in found)} == set()


def package_data() -> dict[str, list[str]]:
    data: dict[str, list[str]] = PYPROJECT["tool"]["setuptools"]["package-data"]
    return data


def data_name(path: Path) -> str:
    """`package/path` under the nearest folder above that is a package."""
    home = next(folder for folder in path.parents if (folder / "__init__.py").is_file())
    return f"{dotted(home / '__init__.py', ROOT)}/{path.relative_to(home)}"


def test_no_stray_code_at_the_top() -> None:
    found = {path.name for path in ROOT.iterdir() if path.is_dir() and any(path.rglob("*.py"))}
    assert {name for name in found if not name.startswith(".")} - {"build", "dist"} <= TOP_LEVEL


def test_the_type_checker_sees_every_package() -> None:
    links = {link.name: link.resolve() for link in (ROOT / ".typing" / "mmjax").iterdir()}
    assert links == {package: ROOT / package for package in PACKAGES if package != "mmjax"}


# packages that several distributions fill
SHARED = {"opentelemetry": ["opentelemetry-sdk", "opentelemetry-exporter-otlp"]}


def third_party() -> Iterator[str]:
    for path in sources(ROOT, *PACKAGES):
        module = dotted(path, ROOT)
        for _, name in imports(ast.parse(path.read_text()), module, path.name == "__init__.py"):
            top = name.partition(".")[0]
            if top not in sys.stdlib_module_names and top not in PACKAGES:
                yield top


def test_dependencies_are_what_is_imported() -> None:
    def plain(name: str) -> str:
        return re.split(r"[<>=!~ \[]", name)[0].lower().replace("_", "-")

    owner = importlib.metadata.packages_distributions()
    needed = {plain(each) for name in third_party() for each in SHARED.get(name, owner.get(name, [name])[:1])}
    declared = {plain(name) for name in PYPROJECT["project"]["dependencies"]}
    optional = PYPROJECT["project"]["optional-dependencies"]
    extras = {plain(name) for extra in ("structured", "bench", "otel", "ray") for name in optional[extra]}
    assert needed | BEHIND_OTHERS == declared | extras


@pytest.mark.parametrize("name", mmjax.__all__)
def test_public_name(name: str) -> None:
    assert getattr(mmjax, name) is not None
    assert name in dir(mmjax)


def test_unknown_name() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Lllm'"):
        mmjax.Lllm  # noqa: B018


def test_import_is_light() -> None:
    code = (
        "import sys, time; start = time.process_time(); import mmjax; took = time.process_time() - start;"
        "print(took); assert not {'jax', 'numpy', 'flax', 'transformers'} & set(sys.modules)"
    )
    assert min(float(python(code, cwd=ROOT)) for _ in range(3)) < 0.05


def test_foundations_are_not_second_modules() -> None:
    code = "import sys, mmjax.kernels, mmjax.converters.table; assert not {'kernels', 'converters'} & set(sys.modules)"
    python(code, cwd=ROOT)


def test_transformers_without_torch_beside_our_kernels() -> None:
    """transformers looks for a distribution called `kernels` and finds the folder at the repository's root."""
    code = """
import importlib.util, os, sys
sys.modules["torch"] = None
assert importlib.util.find_spec("kernels").origin == os.path.join(os.getcwd(), "kernels", "__init__.py")
from transformers import AutoTokenizer, Qwen2VLForConditionalGeneration
assert "jax" not in sys.modules
"""
    python(code, cwd=ROOT)


@pytest.mark.parity
def test_transformers_with_torch_beside_our_kernels() -> None:
    code = """
import sys
from transformers import LlavaForConditionalGeneration, Qwen2VLForConditionalGeneration, WhisperForConditionalGeneration
assert "kernels" in sys.modules and "jax" not in sys.modules
"""
    python(code, cwd=ROOT)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The files of a wheel and of an editable install, made by the build back end alone, without network."""
    if importlib.util.find_spec("setuptools") is None:
        pytest.skip("setuptools is not installed")
    copy = tmp_path_factory.mktemp("source")
    for name in (*PACKAGES, "pyproject.toml", "README.md", "LICENSE"):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, copy / name)
    sites = {}
    for kind in ("wheel", "editable"):
        out = tmp_path_factory.mktemp(kind)
        python(f"from setuptools import build_meta; build_meta.build_{kind}({str(out)!r})", cwd=copy)
        sites[kind] = out / "site"
        with zipfile.ZipFile(next(out.glob("*.whl"))) as archive:
            archive.extractall(sites[kind])
    return {"source": copy, **sites}


def test_wheel(built: dict[str, Path], tmp_path: Path) -> None:
    files = json.loads(python(PROBE, cwd=tmp_path, path=built["wheel"]))
    assert all(Path(file).is_relative_to(built["wheel"] / "mmjax") for file in files)
    assert (built["wheel"] / "mmjax" / "py.typed").is_file()
    assert not (built["wheel"] / "kernels").exists()


def test_wheel_inside_a_checkout(built: dict[str, Path]) -> None:
    files = json.loads(python(PROBE, cwd=ROOT, path=built["wheel"]))
    assert all(Path(file).is_relative_to(ROOT) for file in files)


@pytest.mark.parametrize("inside", [True, False])
def test_editable(built: dict[str, Path], tmp_path: Path, inside: bool) -> None:
    code = f"import site; site.addsitedir({str(built['editable'])!r})\n{PROBE}"
    files = json.loads(python(code, cwd=built["source"] if inside else tmp_path, path=built["editable"]))
    assert all(Path(file).is_relative_to(built["source"]) for file in files)


def test_checkout_without_any_install(built: dict[str, Path]) -> None:
    files = json.loads(python(PROBE, cwd=built["source"]))
    assert all(Path(file).is_relative_to(built["source"]) for file in files)
