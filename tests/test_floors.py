"""The house: which rooms there are, and that imports run down the floors only; and that the door is quiet."""

import ast
import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Iterator

import pytest

ROOT = pathlib.Path(__file__).parents[1]

FLOORS = (  # from the ground up; a room may import every floor below, and the rooms before it on its own
    ("config", "hub", "text", "mesh", "program"),
    ("kernels", "aot", "quantization"),
    ("ops", "sampling"),
    ("cache",),
    ("models",),
    ("weights", "roofline", "decoding"),
    ("speculation", "training"),
    ("engine",),
    ("server",),
)
PLACE = {room: (floor, order) for floor, rooms in enumerate(FLOORS) for order, room in enumerate(rooms)}
TESTING = "testing"  # stands beside the house: it may import anything, and only tests import it
DOORS = {"__init__", "__main__"}  # may name anything
DRAWERS = {"utils", "util", "common", "helpers", "helper", "misc"}  # where everything ends up that has no home
STRANGERS = {"torch", "tensorflow", "transformers"}  # oracles of the tests, never imported by the package
HEAVY = STRANGERS | {"tokenizers", "huggingface_hub", "matplotlib", "optax", "orbax", "flax", "safetensors", "jinja2"}


# --- the checker -------------------------------------------------------------------------------------------------


def complaints(package: pathlib.Path) -> list[str]:
    """What is wrong with the imports of the package in that folder, one sentence each; [] when all is well."""
    found = []
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package).with_suffix("").parts
        room = parts[0]
        where = path.relative_to(package.parent).as_posix()
        found += [f"{where}: no {part} here: a helper lives with its first user" for part in parts if part in DRAWERS]
        if len(parts) == 1 and room in DOORS:
            continue
        if room not in PLACE and room != TESTING:
            found.append(f"{where}: there is no room called {room}: the rooms are {', '.join(PLACE)}")
            continue
        for line, module in imports(path, package):
            complaint = judge(room, module, package.name)
            if complaint:
                found.append(f"{where}:{line}: {complaint}")
    return found


def judge(room: str, module: str, package: str) -> str | None:
    """What is wrong with `room` importing `module` (an absolute dotted name), if anything."""
    top, _, rest = module.partition(".")
    if top in STRANGERS:
        return f"{room} imports {top}, which is an oracle of the tests"
    if top != package:
        return None
    other = rest.partition(".")[0]
    if other.startswith("__"):  # __version__ and the like
        return None
    if other not in PLACE and other != TESTING:
        return f"{room} imports {module}, which is the door's: import the room where it lives"
    if room == TESTING or other == room:
        return None
    if other == TESTING:
        return f"{room} imports testing, which only tests may"
    if PLACE[other][0] > PLACE[room][0]:
        return f"{room} imports {other}, which stands above it"
    if PLACE[other] > PLACE[room]:
        return f"{room} imports {other}, which comes after it on the same floor"
    return None


def imports(path: pathlib.Path, package: pathlib.Path) -> Iterator[tuple[int, str]]:
    """(line, absolute module) of every import in a file: at the top, inside functions, for types, by name.

    `from package import x` counts as package.x, and so does the attribute `package.x`.
    """
    inside = path.relative_to(package.parent).with_suffix("").parts[:-1]  # the package that the file is in
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            # `import package` alone is judged by what is taken from it: the attributes below
            yield from ((node.lineno, alias.name) for alias in node.names if alias.name != package.name)
        elif isinstance(node, ast.ImportFrom):
            start = inside[: len(inside) - node.level + 1] if node.level else ()
            base = ".".join((*start, *filter(None, [node.module])))
            if base == package.name:
                yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)
            else:
                yield node.lineno, base
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == package.name:
            yield node.lineno, f"{package.name}.{node.attr}"
        elif isinstance(node, ast.Call) and node.args and called(node.func) in ("import_module", "__import__"):
            name = node.args[0]
            if isinstance(name, ast.Constant) and isinstance(name.value, str):
                yield node.lineno, name.value


def called(function: ast.expr) -> str:
    """The last word of what is called: `import_module` of importlib.import_module(...)."""
    return getattr(function, "attr", getattr(function, "id", ""))


# --- the checker, checked ----------------------------------------------------------------------------------------


def toy(folder: pathlib.Path, **files: str) -> pathlib.Path:
    """A package `house` with these files; ops__norm is ops/norm.py."""
    package = folder / "house"
    for name, text in {"__init__": "", **files}.items():
        path = package.joinpath(*name.split("__")) if not name.startswith("__") else package / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_suffix(".py").write_text(text)
    return package


DOWN = {
    "config": "import math",
    "ops__norm": "from house import config\nimport house.kernels\nfrom house.config import ModelConfig",
    "ops__mlp": "from house.ops import norm\nfrom .norm import norm\nfrom ..config import ModelConfig",
    "sampling": "from house import ops",
    "decoding": "from house import roofline, weights\nfrom house import __version__",
    "testing": "from house import server, decoding",
    "__init__": "from house.server import serve",
}


def test_imports_that_run_down_are_allowed(tmp_path):
    assert complaints(toy(tmp_path, **DOWN)) == []


@pytest.mark.parametrize(
    ("file", "text", "sentence"),
    [
        ("ops__norm", "import house.models", "ops imports models, which stands above it"),
        ("ops__norm", "from house import config, models", "ops imports models, which stands above it"),
        ("ops__norm", "from house.models.decoder import decoder", "ops imports models, which stands above it"),
        ("ops__norm", "from ..models import decoder", "ops imports models, which stands above it"),
        ("ops__norm", "from .. import models", "ops imports models, which stands above it"),
        ("ops", "from .models import decoder", "ops imports models, which stands above it"),
        ("ops", "from . import models", "ops imports models, which stands above it"),
        ("ops", "def f():\n    import house.models", "ops imports models, which stands above it"),
        ("ops", "import typing\nif typing.TYPE_CHECKING:\n    from house import models", "ops imports models, which"),
        ("ops", "import importlib\nimportlib.import_module('house.models')", "ops imports models, which stands above"),
        ("ops", "import house\nhouse.models.decoder()", "ops imports models, which stands above it"),
        ("ops", "from house import sampling", "ops imports sampling, which comes after it on the same floor"),
        ("weights", "from house import decoding", "weights imports decoding, which comes after it on the same floor"),
        ("ops", "from house import generate", "ops imports house.generate, which is the door's"),
        ("server", "from house import testing", "server imports testing, which only tests may"),
        ("weights", "def f():\n    import torch.nn", "weights imports torch, which is an oracle of the tests"),
        ("kitchen", "", "there is no room called kitchen"),
        ("utils", "", "no utils here: a helper lives with its first user"),
        ("cache__helpers", "", "no helpers here: a helper lives with its first user"),
    ],
)
def test_an_import_that_runs_up_is_named(tmp_path, file, text, sentence):
    found = complaints(toy(tmp_path, **{file: text}))
    assert sentence in found[0]
    assert found[0].startswith(f"house/{file.replace('__', '/')}.py:")


# --- the house itself --------------------------------------------------------------------------------------------


def test_imports_run_down_the_floors_only():
    found = complaints(ROOT / "jaxinfer")
    assert not found, "\n".join(found)


def test_scripts_do_not_import_testing():
    package = ROOT / "jaxinfer"
    found = [
        f"{path.name}:{line}: scripts import no {module}"
        for path in sorted((ROOT / "scripts").rglob("*.py"))
        for line, module in imports(path, package)
        if module.startswith("jaxinfer.testing")
        or (module.split(".")[0] in STRANGERS and path.parent.name != "workers")  # which measure strangers
    ]
    assert not found, "\n".join(found)


PROBE = """
import json, logging, os, sys
before = dict(os.environ)
def handlers():
    loggers = [logging.getLogger(), *map(logging.getLogger, list(logging.Logger.manager.loggerDict))]
    return sum(len(logger.handlers) for logger in loggers)
handlers_before = handlers()
{imports}
import_module = sys.modules.get
bridge = import_module("jax._src.xla_bridge")
print(json.dumps({{
    "environment": sorted(k for k in set(before) | set(os.environ) if before.get(k) != os.environ.get(k)),
    "handlers": handlers() - handlers_before,
    "backends": bool(bridge and bridge.backends_are_initialized()),
    "modules": sorted({{name.partition(".")[0] for name in sys.modules}}),
}}))
"""


def after(imports: str) -> tuple[dict, str, str]:
    """What a fresh interpreter looks like after these imports: (facts, what it printed, its stderr)."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    code = PROBE.format(imports=imports)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    *printed, facts = done.stdout.splitlines()
    return json.loads(facts), "\n".join(printed), done.stderr


def test_importing_jaxinfer_is_silent_and_light():
    facts, printed, errors = after("import jaxinfer")
    assert (printed, errors) == ("", "")
    assert facts["environment"] == []
    assert facts["handlers"] == 0
    assert not facts["backends"]
    assert not HEAVY & set(facts["modules"])


def test_no_room_touches_a_backend_when_imported():
    rooms = [room for room in PLACE if any((ROOT / "jaxinfer").glob(f"{room}.py"))]
    rooms += [room for room in PLACE if (ROOT / "jaxinfer" / room / "__init__.py").exists()]
    ours = "\n".join(f"import jaxinfer.{room}" for room in rooms)
    facts, printed, _ = after(ours)
    # The libraries that the rooms need may set variables and handlers of their own (absl does): the same without us.
    theirs, _, _ = after(outside(ROOT / "jaxinfer"))
    assert printed == ""
    assert not facts["backends"]
    assert facts["environment"] == theirs["environment"]
    assert facts["handlers"] == theirs["handlers"]
    assert not STRANGERS & set(facts["modules"])


def outside(package: pathlib.Path) -> str:
    """Import statements for what the rooms import from elsewhere, at the top of their files."""
    found = set()
    for path in package.rglob("*.py"):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
                found.add(node.module)
    return "\n".join(f"import {name}" for name in sorted(found) if name.partition(".")[0] != package.name)
