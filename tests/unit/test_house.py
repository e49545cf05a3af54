"""The rules of the house, checked by reading the source: who may import whom, what is never used, how files begin.

If a test here fails, the message names the file and the rule; CONTRIBUTING.md says why the rules are there.
"""

import ast
import functools
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "MaxText"

# The layer of every module; a name that ends in .* stands for every module of that subpackage.
LAYERS = {
    "MaxText": 0,
    "MaxText.pyconfig": 0,
    "MaxText.config_files": 0,
    "MaxText.config_rules": 0,
    "MaxText.config_generation_rules": 0,
    "MaxText.hardware": 0,
    "MaxText.compiler_options": 0,
    "MaxText.kernels.*": 0,
    "MaxText.launchers.*": 0,
    "MaxText.sharding": 1,
    "MaxText.flops": 1,
    "MaxText.layers.*": 2,
    "MaxText.input_pipeline.*": 2,
    "MaxText.schedule_plan": 1,
    "MaxText.optimizers": 2,
    "MaxText.metric_logger": 2,
    "MaxText.profiler": 2,
    "MaxText.goodput": 2,
    "MaxText.preemption": 0,
    "MaxText.run_lock": 0,
    "MaxText.processes": 0,
    "MaxText.watchdog": 1,
    "MaxText.agreement": 2,
    "MaxText.checkpoint_manifest": 0,
    "MaxText.config_changes": 0,
    "MaxText.checkpoint_report": 1,
    "MaxText.spikes": 2,
    "MaxText.models": 3,
    "MaxText.train_state": 4,
    "MaxText.hf_weights": 4,
    "MaxText.hf_directory": 5,
    "MaxText.loss": 4,
    "MaxText.train_step": 5,
    "MaxText.checkpointing": 5,
    "MaxText.checkpoint_space": 5,
    "MaxText.corruption": 5,
    "MaxText.inference.*": 6,
    "MaxText.evaluation.*": 6,
    "MaxText.evaluation.checkpoints": 7,
    "MaxText.train_report": 6,
    "MaxText.job": 6,
    "MaxText.aot.*": 7,
    "MaxText.preparation.*": 7,
    "MaxText.hf_export": 8,
    "MaxText.train_loop": 8,
    "MaxText.batch_feed": 7,
    "MaxText.resume": 7,
    "MaxText.run_record": 7,
    "MaxText.train": 9,
    "MaxText.decode": 9,
    "MaxText.decode_compile": 9,
    "MaxText.serve": 9,
    "MaxText.evaluate": 9,
    "MaxText.export_hf": 9,
    "MaxText.prepare_data": 9,
    "MaxText.train_tokenizer": 9,
    "MaxText.train_compile": 9,
    "MaxText.multihost_runner": 9,
    "MaxText.multihost_job": 9,
    "MaxText.checkpoints": 9,
}
ENTRY_LAYER = 9
# One concern in several files, which may import each other as the files of a subpackage may.
SIBLINGS = (
    {
        "MaxText.pyconfig",
        "MaxText.config_files",
        "MaxText.config_rules",
        "MaxText.config_changes",
        "MaxText.config_generation_rules",
    },
)

# Who must not import what, at any depth: (modules, what, except these modules).
FORBIDDEN_IMPORTS = (
    ("MaxText.pyconfig", {"jax", "flax"}, ()),
    ("MaxText.config_", {"jax", "flax"}, ()),
    ("MaxText.kernels.", {"flax", "ml_collections", "MaxText.pyconfig"}, ()),
    ("MaxText.layers.", {"ml_collections", "MaxText.pyconfig"}, ()),
    ("MaxText.input_pipeline.", {"jax", "flax"}, ("MaxText.input_pipeline.device",)),
    ("MaxText", {"pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}, ()),
)
MAX_LINES = 400
MAX_DOCSTRING_LINES = 6


@functools.cache
def modules() -> dict[str, pathlib.Path]:
    """Every module of the package by its dotted name."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@functools.cache
def tree(module: str) -> ast.Module:
    return ast.parse(modules()[module].read_text(), filename=str(modules()[module]))


def imports(module: str, top_level_only: bool = False) -> set[str]:
    """The dotted names that a module imports; `from MaxText import x` counts as MaxText.x when that is a module."""
    found: set[str] = set()
    for node in _outside_functions(tree(module)) if top_level_only else ast.walk(tree(module)):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            names = {f"{base}.{alias.name}" for alias in node.names}
            found.update(names & modules().keys())
            if names - modules().keys():
                found.add(base)
    return found


def _outside_functions(node: ast.AST):
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield child
            yield from _outside_functions(child)


def layer(module: str) -> int:
    """The layer of a module. Raises: ValueError: it is not in the table."""
    subpackage = f"{'.'.join(module.split('.')[:2])}.*"
    if module not in LAYERS and subpackage not in LAYERS:
        raise ValueError(f"{module} has no layer: give it one in LAYERS in {pathlib.Path(__file__).name}")
    return LAYERS.get(module, LAYERS.get(subpackage, -1))


def are_siblings(one: str, other: str) -> bool:
    same_subpackage = one.split(".")[1:2] == other.split(".")[1:2] and max(one.count("."), other.count(".")) > 1
    return same_subpackage or any({one, other} <= group for group in SIBLINGS)


def entry_points() -> list[str]:
    return [module for module in modules() if LAYERS.get(module) == ENTRY_LAYER]


def test_modules_import_lower_layers_and_siblings_only():
    wrong = [
        f"{module} (layer {layer(module)}) imports {imported} (layer {layer(imported)})"
        for module in modules()
        for imported in sorted(imports(module) & modules().keys() - {"MaxText"})
        if layer(imported) >= layer(module) and not are_siblings(module, imported)
    ]
    assert not wrong


def test_nothing_imports_an_entry_point():
    assert not [f"{module} imports {entry}" for module in modules() for entry in imports(module) & set(entry_points())]


def test_no_import_cycles():
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, f"import cycle: {' -> '.join((*path[path.index(module) :], module))}"
        if module in done:
            return
        for imported in sorted(imports(module) & modules().keys()):
            visit(imported, (*path, module))
        done.add(module)

    for module in modules():
        visit(module, ())


def test_imports_are_absolute_and_through_the_package():
    flat_names = {path.stem for path in modules().values() if path.stem != "__init__"} | {
        path.name for path in PACKAGE.iterdir() if path.is_dir()
    }
    for module in modules():
        for node in ast.walk(tree(module)):
            if isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{module}:{node.lineno}: relative import"
                assert node.names[0].name != "*", f"{module}:{node.lineno}: star import"
                assert (node.module or "").split(".")[0] not in flat_names, f"{module}:{node.lineno}: flat import"
            if isinstance(node, ast.Import):
                for alias in node.names:
                    root = alias.name.split(".")[0]
                    assert root not in {"MaxText"} | flat_names, f"{module}:{node.lineno}: write from MaxText import x"


def test_packages_import_nothing():
    for module, path in modules().items():
        if path.name == "__init__.py":
            assert not imports(module), f"{module}/__init__.py imports {imports(module)}"


def test_forbidden_imports():
    for prefix, forbidden, exceptions in FORBIDDEN_IMPORTS:
        for module in modules():
            if module.startswith(prefix) and module not in exceptions:
                found = {name for name in imports(module) if name in forbidden or name.split(".")[0] in forbidden}
                assert not found, f"{module} imports {found}"


def test_launchers_run_where_nothing_is_installed():
    for module in modules():
        if module.startswith(("MaxText.launchers", "MaxText.multihost")):
            needed = {name for name in imports(module) if not name.startswith("MaxText.launchers")}
            outside = {name for name in needed if name.split(".")[0] not in sys.stdlib_module_names}
            assert not outside, f"{module} runs where nothing is installed, but imports {outside}"


def test_no_code_is_run_from_data():
    """eval, unsafe YAML, pickled arrays and code from a model hub would let a data file run code."""
    for module in modules():
        for node in ast.walk(tree(module)):
            if not isinstance(node, ast.Call):
                continue
            where = f"{modules()[module].relative_to(ROOT)}:{node.lineno}"
            assert not (isinstance(node.func, ast.Name) and node.func.id == "eval"), f"{where}: eval"
            assert ast.unparse(node.func) not in {"yaml.load", "yaml.unsafe_load"}, f"{where}: use yaml.safe_load"
            for keyword in node.keywords:
                if keyword.arg in {"allow_pickle", "trust_remote_code"}:
                    safe = isinstance(keyword.value, ast.Constant) and keyword.value.value is False
                    assert safe, f"{where}: {keyword.arg} must be False"


def test_names_say_what_is_inside():
    for module, path in modules().items():
        assert path.stem not in sys.stdlib_module_names, f"{path.name} shadows a standard-library module"
        assert not {"utils", "util", "helpers", "common", "misc"} & set(module.split(".")), module


def test_files_are_short_and_say_what_they_do():
    for module, path in modules().items():
        lines = len(path.read_text().splitlines())
        assert lines <= MAX_LINES, f"{path.relative_to(ROOT)} has {lines} lines: has one thing become two?"
        if not path.stem.startswith("_") or path.stem == "__init__":
            docstring = ast.get_docstring(tree(module)) or ""
            assert docstring, f"{path.relative_to(ROOT)} has no docstring"
            written = [line for line in docstring.splitlines() if line.strip()]
            assert len(written) <= MAX_DOCSTRING_LINES, f"{path.relative_to(ROOT)}: docstring too long"


def test_there_is_an_entry_point():
    assert "MaxText.train" in entry_points()


@pytest.mark.parametrize("module", entry_points())
def test_entry_points_load_nothing_before_main(module: str):
    outside = {name.split(".")[0] for name in imports(module, top_level_only=True)} - sys.stdlib_module_names
    assert not outside, f"{module} imports {outside} outside main()"
    body = [node for node in tree(module).body if not isinstance(node, ast.Import | ast.ImportFrom | ast.Expr)]
    first = ast.unparse(body[0])
    assert first.startswith("if __spec__ is None:\n    sys.path[0] = "), f"{module} begins with: {first}"


def test_train_help_works_from_anywhere(tmp_path: pathlib.Path, user_environment: dict[str, str]):
    command = [sys.executable, str(PACKAGE / "train.py"), "--help"]
    result = subprocess.run(command, cwd=tmp_path, env=user_environment, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    assert "per_device_batch_size" in result.stdout


def test_no_module_is_loaded_under_two_names(tmp_path: pathlib.Path, user_environment: dict[str, str]):
    """Runs train.py as the command line does, then imports the whole package, and looks for a file loaded twice."""
    program = f"""
import collections, importlib, os, runpy, sys
sys.argv = [{str(PACKAGE / "train.py")!r}, "--help"]
sys.path[0] = {str(PACKAGE)!r}
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as end:
    assert not end.code, end.code
for name in {[module for module in modules() if layer(module) < ENTRY_LAYER]!r}:
    importlib.import_module(name)
names = collections.defaultdict(list)
for name, module in list(sys.modules.items()):
    file = getattr(module, "__file__", None) or ""
    if file.startswith({str(PACKAGE)!r} + os.sep):
        names[file].append(name)
assert len(names) > 5, names
for file, found in names.items():
    assert len(found) == 1 and found[0].startswith("MaxText"), (file, found)
"""
    environment = {**user_environment, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", program]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr


def test_every_config_key_is_read_somewhere():
    from MaxText import config_files, config_rules

    readers = [p for p in (ROOT / "MaxText").rglob("*.py") if not p.name.startswith(("pyconfig", "config_"))]
    text = "\n".join(path.read_text() for path in readers)
    by_pattern = ("ici_", "dcn_", *config_rules.REMAT_KEYS)  # read by constructed names
    unread = [key for key in config_files.manual() if not key.startswith(by_pattern) and f"config.{key}" not in text]
    assert not unread
