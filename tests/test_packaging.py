"""What a user installs: metadata, files in the wheel, what an import loads, and the layers."""

from __future__ import annotations

import ast
import email
import re
import subprocess
import sys
import zipfile
from email.message import Message
from pathlib import Path

import pytest

from perpetune import __version__

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "perpetune"
HEAVY = [
    *("timm", "transformers", "peft", "open_clip", "torchvision", "accelerate"),
    *("datasets", "pyarrow", "pandas", "sklearn", "scipy", "matplotlib", "PIL"),
    *("rich", "typer", "jinja2"),
    *("fastapi", "uvicorn", "prometheus_client"),
    *("bitsandbytes", "huggingface_hub"),
]


def python(code: str) -> str:
    """What a fresh interpreter prints."""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def loaded(code: str, modules: list[str]) -> set[str]:
    """Those of `modules` that a fresh interpreter has loaded after `code`."""
    output = python(f"{code}\nimport sys\nprint('LOADED', *(m for m in {modules!r} if m in sys.modules))")
    return set(output.splitlines()[-1].removeprefix("LOADED").split())


def test_import_loads_nothing_heavy() -> None:
    assert loaded("import perpetune", HEAVY) == set()


def test_public_names_load_nothing_heavier_than_torch_draw_no_random_number_and_warn_of_nothing() -> None:
    code = """
import warnings
warnings.simplefilter("error")
import random, numpy, torch
before = torch.random.get_rng_state(), numpy.random.get_state()[1].copy(), random.getstate()
import perpetune
for name in perpetune.__all__: getattr(perpetune, name)
import perpetune.build, perpetune.export, perpetune.models.loaders.folder, perpetune.pets.lora
assert torch.equal(before[0], torch.random.get_rng_state())
assert (before[1] == numpy.random.get_state()[1]).all()
assert before[2] == random.getstate()
"""
    assert loaded(code, HEAVY) == set()


@pytest.mark.parametrize("verb", ["", "run", "predict", "report"])
def test_help_loads_no_torch(verb: str) -> None:
    code = f"""
import sys
sys.argv = ["perpetune", *{verb.split()!r}, "--help"]
from perpetune.cli import main
try:
    main()
except SystemExit as stop:
    assert not stop.code, stop.code
"""
    heavy = [name for name in HEAVY if name not in ("rich", "typer")]
    assert loaded(code, ["torch", "numpy", *heavy]) == set()


def test_layers() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "from importlinter.cli import lint_imports_command; lint_imports_command()"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The wheel, built without network."""
    folder = tmp_path_factory.mktemp("wheel")
    done = subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(folder)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return zipfile.ZipFile(next(folder.glob("*.whl")))


@pytest.fixture(scope="module")
def metadata(wheel: zipfile.ZipFile) -> Message:
    return email.message_from_bytes(wheel.read(f"perpetune-{__version__}.dist-info/METADATA"))


def test_wheel_holds_every_file_of_the_package(wheel: zipfile.ZipFile) -> None:
    files = {
        f"perpetune/{path.relative_to(PACKAGE).as_posix()}"
        for path in PACKAGE.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    packed = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert packed == files
    assert "perpetune/py.typed" in packed


def test_metadata(wheel: zipfile.ZipFile, metadata: Message) -> None:
    assert metadata["Name"] == "perpetune"
    assert metadata["Version"] == __version__
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.10"
    extras = ["all", "data", "docs", "lm", "onnx", "openclip", "peft", "resize", "serve", "test", "timm", "track"]
    assert metadata.get_all("Provides-Extra") == extras
    info = f"perpetune-{__version__}.dist-info"
    assert "perpetune = perpetune.cli:main" in wheel.read(f"{info}/entry_points.txt").decode()
    assert "Apache License" in wheel.read(f"{info}/licenses/LICENSE").decode()


def test_core_dependencies(metadata: Message) -> None:
    required = [line for line in metadata.get_all("Requires-Dist", []) if "extra ==" not in line]
    assert {re.split(r"[<>=!~ ;\[]", line)[0].lower() for line in required} == {
        "accelerate",
        "jinja2",
        "numpy",
        "pillow",
        "pydantic",
        "pyyaml",
        "rich",
        "safetensors",
        "scikit-learn",
        "torch",
        "transformers",
        "typer",
    }


def test_version_is_the_same_everywhere() -> None:
    assert f"\nversion: {__version__}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\n## [{__version__}] - " in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def imports(path: Path, modules: set[str]) -> set[str]:
    """The modules of the package that a file imports anywhere, but for those that only a type checker imports."""
    found: set[str] = set()

    def look(node: ast.AST) -> None:
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            for other in node.orelse:
                look(other)
            return
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            found.update(inner & modules or {str(node.module)})
        for child in ast.iter_child_nodes(node):
            look(child)

    look(ast.parse(path.read_text()))
    return found & modules


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """The groups of modules each of which leads to the others."""
    reached = {}
    for start in graph:
        seen, open_ = set[str](), [start]
        while open_:
            new = graph[open_.pop()] - seen
            seen |= new
            open_ += new
        reached[start] = seen
    groups = {frozenset(b for b in reached[a] if a in reached[b]) for a in graph if a in reached[a]}
    return sorted(sorted(group) for group in groups)


def test_no_module_imports_itself_through_others() -> None:
    names = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    graph = {name: imports(path, set(names)) for name, path in names.items()}
    assert len(graph) > 100
    assert graph["perpetune.data.texts.trace"] >= {"perpetune.data.texts.files", "perpetune.errors"}
    assert circles(graph) == []


def test_a_circle_is_found() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"d"}, "e": set()}) == [["b", "c"], ["d"]]
