"""Documentation cannot drift: every setting, command, error and engine is described."""

from __future__ import annotations

import inspect
import re
from importlib.metadata import entry_points
from pathlib import Path

import pytest
import yaml

from llmos import errors
from llmos.cli import reference
from llmos.cli.main import llmos
from llmos.config import Config
from llmos.kernel import accounting
from llmos.privacy import PoissonSampledGaussian
from llmos.workflows.calibration import calibrate_noise

ROOT = Path(__file__).parents[2]


def error_classes() -> list[type[errors.LlmosError]]:
    found = [value for _, value in inspect.getmembers(errors, inspect.isclass)]
    return [cls for cls in found if issubclass(cls, errors.LlmosError)]


def test_every_setting_is_described_with_its_environment_variable() -> None:
    text = (ROOT / "docs/configuration.md").read_text()
    for name in Config.model_fields:
        assert f"| `{name}` | `LLMOS_{name.upper()}` |" in text


def test_the_command_reference_is_what_the_commands_say() -> None:
    written = (ROOT / "docs/commands.md").read_text()
    assert written == reference.render(), "run: python -m llmos.cli.reference > docs/commands.md"


def test_every_command_takes_json_or_only_prints_files() -> None:
    without = {
        path
        for path, command, _ in reference.commands(llmos, "llmos")
        if not hasattr(command, "commands")
        and "--json" not in [name for p in command.params for name in p.opts]
    }
    assert without == {
        "llmos policy schema",
        "llmos serve",
        "llmos party serve",
        "llmos coordinator up",
        "llmos site up",
    }


@pytest.mark.parametrize("cls", error_classes(), ids=lambda cls: cls.__name__)
def test_every_error_is_listed_with_its_statuses(cls: type[errors.LlmosError]) -> None:
    row = f"| `{cls.__name__}` | {cls.exit_status} | {cls.http_status} |"
    assert row in (ROOT / "docs/errors.md").read_text()
    assert cls.__name__ in (errors.__doc__ or "")
    assert 0 < cls.exit_status < 126


def test_every_engine_has_a_readme_that_says_what_it_does_not_protect() -> None:
    engines = list(entry_points(group="llmos.engines"))
    assert engines
    for engine in engines:
        text = (ROOT / "src" / engine.module.replace(".", "/") / "README.md").read_text()
        for heading in ("protects", "does not protect", "life of a", "cost"):
            assert heading in text.lower()


def test_readme_shows_the_two_commands_and_both_languages_link_each_other() -> None:
    english, chinese = (ROOT / name for name in ("README.md", "README.zh-CN.md"))
    assert "README.zh-CN.md" in english.read_text()
    assert "README.md" in chinese.read_text()
    for text in (english.read_text(), chinese.read_text()):
        assert "@@" not in text, "a figure was not filled in"
        assert "make demo" in text
        assert "make test" in text


@pytest.mark.parametrize("units", [300, 600, 2000])
def test_the_job_of_the_federated_page_fits_the_budget_that_stands_above_it(units: int) -> None:
    text = (ROOT / "docs/federated.md").read_text()
    imported = re.search(r"data import .* --epsilon (\S+) --delta (\S+)", text)
    example = re.search(r"```yaml\n(.*?)```", text, re.DOTALL)
    assert imported is not None
    assert example is not None
    budget, delta = (float(number) for number in imported.groups())
    job = yaml.safe_load(example[1])
    steps = (job["rounds"] + job["spare_rounds"]) * job["local_steps"]
    rate = job["batch"] / units
    noise = calibrate_noise(rate, steps, job["epsilon"], job["delta"])
    order = accounting.fixed_order(budget, delta)
    cost = accounting.renyi(PoissonSampledGaussian(rate, noise, steps), order)
    assert cost < 0.3 * accounting.renyi_cap(budget, delta, order)
