"""The worked examples in docs/forks still apply to this code, are small, and do what they say.

They are applied to a copy of the repository, and their tests are run there; in a copy without the changes these fail.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PATCHES = sorted((ROOT / "docs" / "forks").glob("*.patch"))
COPIED = ("minitau", "tests", "train.py", "eval.py", "serve_user.py", "pyproject.toml")

pytestmark = pytest.mark.skipif(not shutil.which("git"), reason="git applies the examples, and is not installed")


def copy_to(folder: Path) -> Path:
    folder.mkdir()
    for name in COPIED:
        source = ROOT / name
        (shutil.copytree if source.is_dir() else shutil.copy2)(source, folder / name)
    return folder


def apply(patch: Path, folder: Path, *flags: str) -> None:
    """As the patch itself tells its reader to; no line around a change may have moved away."""
    # A folder above that is a repository would make git look for the files there.
    env = {**os.environ, "GIT_CEILING_DIRECTORIES": str(folder.parent)}
    done = subprocess.run(["git", "apply", *flags, str(patch)], cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, f"{patch.name} does not fit the code any more: write it anew\n{done.stderr}"


def start(folder: Path) -> subprocess.Popen:
    tests = [f"tests/test_{patch.stem}.py" for patch in PATCHES]
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-vv", "--tb=short", *tests]
    return subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """What pytest says of the examples' tests: with all examples applied, and with none.

    Together, because most of the time goes into starting up; that each one also applies alone is looked at before.
    """
    place = tmp_path_factory.mktemp("forks")
    forked, plain = copy_to(place / "forked"), copy_to(place / "plain")
    for patch in PATCHES:
        apply(patch, plain, "--check")
    for patch in PATCHES:
        apply(patch, forked)
        apply(patch, plain, "--include=tests/*")
    both = start(forked), start(plain)
    return [process.communicate(timeout=120)[0] for process in both]


def test_the_examples_are_found():
    assert len(PATCHES) >= 3


@pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: patch.stem)
def test_an_example_is_small_and_explains_itself(patch):
    text = patch.read_text(encoding="utf-8")
    preface, *files = re.split(r"^diff --git a/", text, flags=re.MULTILINE)
    code = [file for file in files if not file.startswith("tests/")]
    changed = [line for file in code for line in file.split("\n") if re.match(r"[-+](?![-+])", line)]
    assert 0 < len(changed) < 15, changed
    assert len(files) - len(code) == 1, "it brings one test"
    assert f"git apply docs/forks/{patch.name}" in preface and f"pytest tests/test_{patch.stem}.py" in preface
    assert f"docs/forks/{patch.name}" in (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: patch.stem)
def test_an_example_passes_its_test_and_only_with_its_change(ran, patch):
    forked, plain = ran
    name = rf"tests/test_{patch.stem}\.py::\w+ "
    assert re.search(name + "PASSED", forked), forked
    assert re.search(name + "FAILED", plain), plain
