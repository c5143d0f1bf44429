"""The house: which room may import which, what an import costs, what no file may contain."""

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = {
    "qllama": ROOT / "qllama",
    "qllama_kernels": ROOT / "kernels" / "qllama_kernels",
    "qllama_convert": ROOT / "convert" / "qllama_convert",
}

# What each room may import directly; what those may import, it may too. The longest name that
# fits a module is its room: a module that fits none has to be given a place here first.
MAY_IMPORT: dict[str, set[str]] = {
    "qllama.errors": set(),
    "qllama_kernels": set(),
    "qllama.quantization": {"qllama_kernels", "qllama.errors"},
    "qllama.config": {"qllama.quantization"},
    "qllama.model": {"qllama.config"},
    "qllama.parallel": {"qllama.model"},
    "qllama.threads": set(),
    "qllama_convert": {"qllama.parallel", "qllama.threads"},
    "qllama.engine": {"qllama.parallel"},
    "qllama.gptq": {"qllama_convert", "qllama.device", "qllama.progress", "qllama.tokenizer"},
    "qllama.demo": set(),
    "qllama.device": {"qllama.config"},
    "qllama.progress": {"qllama.errors"},
    "qllama.tokenizer": {"qllama.errors"},
    "qllama.outputs": {"qllama.engine"},
    "qllama.completion": {"qllama.outputs", "qllama.tokenizer"},
    "qllama.llm": {
        "qllama.completion",
        "qllama.demo",
        "qllama.device",
        "qllama.gptq",
        "qllama.progress",
    },
    "qllama.evaluate": {"qllama.llm"},
    "qllama.serve": {"qllama.llm"},
    "qllama": {"qllama.evaluate", "qllama.serve"},
    "qllama.cli": {"qllama"},
    "qllama.__main__": {"qllama.cli"},
    "qllama.demo.train": {"qllama"},
}

# Slow to import, and not needed by everything that imports qllama.
HEAVY = (
    "huggingface_hub",
    "orbax",
    "rich",
    "safetensors",
    "tensorstore",
    "tokenizers",
    "torch",
    "transformers",
)
# Programs: they talk to a terminal, and pay for their imports when they start.
PROGRAMS = ("qllama.cli", "qllama.__main__", "qllama.demo.train")


class Module(NamedTuple):
    name: str
    path: Path
    tree: ast.Module

    @property
    def package(self) -> str:
        return self.name if self.path.name == "__init__.py" else self.name.rpartition(".")[0]


def _modules() -> Iterator[Module]:
    for package, folder in PACKAGES.items():
        for path in sorted(folder.rglob("*.py")):
            parts = (package, *path.relative_to(folder).with_suffix("").parts)
            name = ".".join(parts).removesuffix(".__init__")
            yield Module(name, path, ast.parse(path.read_text(encoding="utf-8"), path))


MODULES = {module.name: module for module in _modules()}


def within(name: str, packages: Iterable[str]) -> bool:
    return any(name == package or name.startswith(package + ".") for package in packages)


LIBRARY = {name: module for name, module in MODULES.items() if not within(name, PROGRAMS)}
KERNELS = {name: module for name, module in MODULES.items() if within(name, ["qllama_kernels"])}


def each(modules: dict[str, Module]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("module", modules.values(), ids=modules.keys())


def imported_modules(module: Module, nodes: Iterator[ast.AST]) -> set[str]:
    """Full names of the modules that the import statements among `nodes` load."""
    names = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            source = node.module or ""
            if node.level:
                base = module.package.split(".")
                source = ".".join([*base[: len(base) + 1 - node.level], *filter(None, [source])])
            for alias in node.names:
                submodule = f"{source}.{alias.name}"
                names.add(submodule if submodule in MODULES else source)
    return names


def at_import(node: ast.AST) -> Iterator[ast.AST]:
    """The statements that run when the module is imported."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        yield child
        yield from at_import(child)


def room_of(name: str) -> str:
    rooms = [room for room in MAY_IMPORT if name == room or name.startswith(room + ".")]
    room = max(rooms, key=len, default="")
    if room == "qllama" != name:
        pytest.fail(f"{name} is in no room of MAY_IMPORT: say there what it may import")
    return room


def reachable(room: str) -> set[str]:
    return {room}.union(*(reachable(lower) for lower in MAY_IMPORT[room]))


@each(MODULES)
def test_imports_follow_the_plan(module: Module) -> None:
    allowed = reachable(room_of(module.name))
    # The facade resolves its names when they are asked for; it alone may look up from a function.
    nodes = at_import(module.tree) if module.name == "qllama" else ast.walk(module.tree)
    imported = {n for n in imported_modules(module, nodes) if within(n, PACKAGES)}
    wrong = sorted(name for name in imported if room_of(name) not in allowed)
    assert not wrong, f"{module.name} may import {sorted(allowed)}, not {wrong}"


@each(KERNELS)
def test_kernels_need_jax_alone(module: Module) -> None:
    names = {name.split(".")[0] for name in imported_modules(module, ast.walk(module.tree))}
    others = names - sys.stdlib_module_names - {"jax", "jaxlib", "numpy", "qllama_kernels"}
    assert not others, f"{module.name} imports {sorted(others)}"


@each(LIBRARY)
def test_heavy_libraries_are_imported_where_they_are_used(module: Module) -> None:
    names = imported_modules(module, at_import(module.tree))
    heavy = sorted(name for name in names if within(name, HEAVY))
    assert not heavy, f"{module.name} imports {heavy} at its top: move it into the function"


@each(LIBRARY)
def test_libraries_do_not_print(module: Module) -> None:
    lines = [
        node.lineno
        for node in ast.walk(module.tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "print"
    ]
    assert not lines, f"{module.path}: print on lines {lines}"


@pytest.mark.parametrize("package", ["qllama_kernels", "qllama_convert"])
def test_packages_re_export_nothing(package: str) -> None:
    module = MODULES[package]
    assert imported_modules(module, ast.walk(module.tree)) == set()


@pytest.mark.parametrize("folder", ["kernels", "convert"])
def test_outer_folders_are_no_packages(folder: str) -> None:
    """transformers would take an importable `kernels` for Hugging Face's library of that name."""
    assert (ROOT / folder).is_dir()
    assert not (ROOT / folder / "__init__.py").exists()


@pytest.mark.parametrize("package", PACKAGES)
def test_each_package_can_be_imported_first_and_is_light(package: str) -> None:
    script = f"import {package}, json, sys; print(json.dumps(sorted(sys.modules)))"
    loaded = json.loads(run_python(script))
    assert package in loaded
    # rich comes with flax.
    heavy = {name for name in loaded if within(name, HEAVY) and not within(name, ["rich"])}
    assert not heavy


def test_every_module_can_be_imported_first() -> None:
    """In one process, from the front and from the back, which shows most cycles at a fair price."""
    for names in (list(LIBRARY), list(LIBRARY)[::-1]):
        script = f"""if True:
            import importlib, json, sys
            for name in {names}:
                importlib.import_module(name)
            import jax
            from jax._src import xla_bridge
            print(json.dumps([xla_bridge.backends_are_initialized(), sorted(sys.modules)]))
        """
        initialised, loaded = json.loads(run_python(script))
        assert not initialised, "importing qllama starts a device"
        assert not {name for name in loaded if within(name, ["transformers", "torch", "orbax"])}


def run_python(script: str) -> str:
    paths = [str(folder.parent) for folder in PACKAGES.values()]
    script = f"import sys; sys.path[:0] = {paths}\n{script}"
    command = [sys.executable, "-W", "error", "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_no_tracked_file_names_a_path_of_one_machine() -> None:
    listing = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listing.returncode:
        pytest.skip("not a git checkout")
    pattern = re.compile(r"(?<![\w.*~-])/(home|root|tmp|Users|work)/\w+")
    found = []
    for name in listing.stdout.splitlines():
        path = ROOT / name
        if not path.is_file():  # removed, and not yet committed
            continue
        content = path.read_bytes()
        if b"\0" in content[:8192]:
            continue
        for number, line in enumerate(content.decode("utf-8", "replace").splitlines(), start=1):
            if match := pattern.search(line):
                found.append(f"{name}:{number}: {match[0]}")
    assert not found, "\n".join(found)
