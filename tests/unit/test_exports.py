"""The public door: what `import llmos` offers, and that it stays cheap."""

from __future__ import annotations

import subprocess
import sys

import pytest

import llmos


def test_all_is_sorted_and_every_name_resolves() -> None:
    assert llmos.__all__ == sorted(llmos.__all__)
    for name in llmos.__all__:
        assert getattr(llmos, name) is not None


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        llmos.nonsense  # noqa: B018


@pytest.mark.parametrize(
    "code", ["import llmos", "from llmos.cli.main import run; run(['--help'])"]
)
def test_importing_llmos_and_asking_for_help_load_nothing_heavy(code: str) -> None:
    heavy = {"torch", "transformers", "sqlalchemy", "dp_accounting", "matplotlib", "rich"}
    check = f"{code}\nimport sys\nprint(sorted({heavy!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("act", ["report", "train", "erase", "worker", "export"])
def test_an_act_that_computes_no_gradient_does_not_load_the_learning_stack(act: str) -> None:
    check = (
        f"import llmos.workflows.{act}, sys\nprint({{'torch', 'transformers'}} & {{*sys.modules}})"
    )
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
