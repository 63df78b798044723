"""The planted bugs of tests/mutants still fit the code, so that `make mutants` can show that tests catch them."""

import re
import shutil
import subprocess

import pytest
from mutants.run import PATCHES, ROOT, named_by

pytestmark = pytest.mark.skipif(shutil.which("git") is None, reason="patches are applied by git")


def test_there_are_at_least_20():
    assert len(PATCHES) >= 20


@pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: patch.stem)
def test_a_planted_bug_applies_and_names_tests_that_exist(patch):
    done = subprocess.run(["git", "apply", "--check", str(patch)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    changed = re.findall(r"^\+\+\+ b/(\S+)$", patch.read_text(encoding="utf-8"), re.MULTILINE)
    assert changed and all(path.startswith("mmtx/") for path in changed)
    for test in named_by(patch):
        file, _, name = test.partition("::")
        assert f"def {name.partition('[')[0]}(" in (ROOT / file).read_text(encoding="utf-8"), test
