"""The floors of DESIGN.md, held by reading the imports of every file: they point down, and nothing goes in a circle."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ("train", "eval", "serve_user")
FILES = [ROOT / f"{name}.py" for name in SCRIPTS] + sorted((ROOT / "minitau").rglob("*.py"))


def name_of(path):
    """minitau/envs/__init__.py is "minitau.envs", train.py is "train"."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


TREES = {name_of(path): ast.parse(path.read_text(encoding="utf-8")) for path in FILES}
OURS = set(TREES)


def at_module_level(tree):
    """The nodes that run when the module is imported: everything outside of functions."""
    todo = list(tree.body)
    while todo:
        node = todo.pop()
        yield node
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            todo += ast.iter_child_nodes(node)


def imported(nodes):
    """Full names of what these nodes import: `from minitau import chat` gives "minitau.chat"."""
    names = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute here"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def module(name):
    """The module of ours that an imported name is, or is in; None if it is not ours."""
    while name and name not in OURS:
        name = name.rpartition(".")[0]
    return name if name and name != "minitau" else None


# Who imports whom, of ours; inside functions as well, because an import put there still points somewhere.
IMPORTS = {name: {module(each) for each in imported(ast.walk(tree))} - {None, name} for name, tree in TREES.items()}
GROUND = {
    f"minitau.{name}"
    for name in (
        "episode",
        "attention",
        "head",
        "model",
        "parallel",
        "grpo",
        "config",
        "files",
        "script",
        "log",
        "estimators",
    )
}
# What stands on the ground floor may be used there by what is made of it.
PARTS = {
    "minitau.config": {"minitau.episode"},
    "minitau.files": {"minitau.episode"},
    "minitau.script": {"minitau.episode"},
    "minitau.log": {"minitau.episode", "minitau.files", "minitau.script"},
    "minitau.model": {"minitau.attention", "minitau.head"},
}
UPPER = {"minitau.sft", "minitau.tiny", "minitau.base.talk"}  # they speak of worlds and rollouts, but train nothing
TOP = {*SCRIPTS, "minitau.demo", "minitau.base.pretrain"}
ROOF = {"minitau.study", "minitau.ablate"}  # repeat the demo or parts of it, and so may know it


def floor(name):
    return 0 if name in GROUND else 2 if name in UPPER else 3 if name in TOP else 4 if name in ROOF else 1


def test_the_files_are_found():
    assert len(OURS) > 20 and OURS >= GROUND | UPPER | TOP
    assert IMPORTS["eval"] >= {"minitau.rollout", "minitau.envs"} and IMPORTS["minitau.engines"]


@pytest.mark.parametrize("name", sorted(GROUND))
def test_the_ground_floor_imports_nothing_of_ours(name):
    assert IMPORTS[name] <= PARTS.get(name, set())


def test_imports_point_down():
    wrong = [(name, other) for name, others in IMPORTS.items() for other in others if floor(other) > floor(name)]
    assert not wrong
    assert not [(name, other) for name in OURS - ROOF for other in IMPORTS[name] if other in TOP]


def test_no_import_goes_in_a_circle():
    left = {name: set(others) for name, others in IMPORTS.items()}
    while left:
        free = {name for name, others in left.items() if not others & left.keys()}
        assert free, f"a circle among {sorted(left)}"
        left = {name: others for name, others in left.items() if name not in free}


def test_environments_know_episodes_and_themselves_only():
    for name in OURS:
        if name.startswith("minitau.envs."):
            package = ".".join(name.split(".")[:3])
            others = {other for other in IMPORTS[name] if other != "minitau.episode"}
            assert all(other == package or other.startswith(f"{package}.") for other in others), (name, others)


def test_a_rollout_knows_no_engine_environment_or_model_by_name():
    below = {"minitau.model", "minitau.grpo", "minitau.batch", "minitau.checkpoint", "minitau.pretrained"}
    assert not {
        n for n in IMPORTS["minitau.rollout"] if n in below or n.startswith(("minitau.engines", "minitau.envs"))
    }
    # Nor does any file on the middle floor, except an engine, know the model and a world at once.
    assert not {n for n in IMPORTS["minitau.chat"] if n != "minitau.episode"}


def test_only_one_file_imports_torch_distributed():
    users = {
        name
        for name, tree in TREES.items()
        if any(
            each == "torch.distributed" or each.startswith("torch.distributed.") for each in imported(ast.walk(tree))
        )
    }
    assert users == {"minitau.parallel"}
    # `torch.distributed` is also there without an import of its own once somebody else has made one.
    dotted = {
        name
        for name, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and node.attr == "distributed"
        and isinstance(node.value, ast.Name)
        and node.value.id == "torch"
    }
    assert dotted <= {"minitau.parallel"}


@pytest.mark.parametrize("package", ["tau2", "litellm", "wandb", "tensorboard", "matplotlib", "transformers"])
def test_what_may_be_missing_is_imported_only_when_it_is_used(package):
    for name, tree in TREES.items():
        names = imported(at_module_level(tree))
        assert not {each for each in names if each.split(".")[0] == package}, name


def test_no_text_is_ever_evaluated():
    for name, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                called = node.func
                if isinstance(called, ast.Name):
                    assert called.id not in ("eval", "exec", "compile", "__import__"), (name, node.lineno)
                if isinstance(called, ast.Attribute) and isinstance(called.value, ast.Name):
                    what = f"{called.value.id}.{called.attr}"
                    assert what not in ("ast.literal_eval", "builtins.eval", "os.system", "pickle.loads"), name
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                assert not imported([node]) & {"builtins.eval", "builtins.exec", "ast.literal_eval"}, name


def test_every_file_says_what_it_is_for():
    for name, tree in TREES.items():
        assert name == "minitau" or ast.get_docstring(tree), f"{name} has no docstring"
