"""The command line's own promises: verbs come from a table, errors are one line with the right exit code."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from sparsering import __version__, cli
from sparsering.traces.errors import InputError

RUNNER = CliRunner()


@pytest.fixture
def verb_that_raises(monkeypatch: pytest.MonkeyPatch):
    """Return a function that makes `sparsering check` raise the given error."""

    def install(error: Exception) -> None:
        def fail() -> None:
            raise error

        command = cli.typer.Typer(add_completion=False)
        command.command("check")(fail)
        monkeypatch.setattr(cli, "_command", lambda name: cli.typer.main.get_command(command))

    return install


def test_help_lists_every_verb_of_the_table():
    result = RUNNER.invoke(cli.app, ["--help"])
    assert result.exit_code == 0
    listed = [line.split()[0] for line in result.stdout.partition("Commands:")[2].splitlines() if line.strip()]
    assert listed == list(cli.VERBS)
    assert "..." not in result.stdout.partition("Commands:")[2], "a help line is too long for 80 columns"


def test_version():
    result = RUNNER.invoke(cli.app, ["--version"])
    assert (result.exit_code, result.stdout) == (0, f"sparsering {__version__}\n")


def test_input_error_is_one_line_and_exit_code_2(verb_that_raises):
    verb_that_raises(InputError("is 3, must be\n  64 or 128", source="plan.json", field="block_size"))
    result = RUNNER.invoke(cli.app, ["check"])
    assert result.exit_code == 2
    assert result.stderr == "sparsering: plan.json: block_size: is 3, must be 64 or 128\n"
    assert result.stdout == ""


def test_missing_gpu_extra_says_what_to_install(verb_that_raises):
    verb_that_raises(ModuleNotFoundError("No module named 'torch'", name="torch"))
    result = RUNNER.invoke(cli.app, ["check"])
    assert result.exit_code == 1
    told = "this needs torch, which is not installed: `sparsering doctor` prints the command that installs it"
    assert result.stderr == f"sparsering: {told}\n"


def test_any_other_missing_module_keeps_its_traceback(verb_that_raises):
    verb_that_raises(ModuleNotFoundError("No module named 'sparsering.planner.typo'", name="sparsering.planner.typo"))
    result = RUNNER.invoke(cli.app, ["check"])
    assert isinstance(result.exception, ModuleNotFoundError)


def test_unknown_verb_is_a_usage_error_with_a_suggestion():
    result = RUNNER.invoke(cli.app, ["simulat"])
    assert result.exit_code == 2
    assert "simulate" in result.stderr


@pytest.mark.parametrize("name", list(cli.VERBS))
def test_every_verb_resolves_and_has_help(name: str):
    result = RUNNER.invoke(cli.app, [name, "--help"])
    assert result.exit_code == 0, result.output
    assert f"sparsering {name}" in result.stdout.replace("root", "sparsering")


@pytest.mark.parametrize("name", list(cli.SERVICES))
def test_every_service_resolves(name: str):
    assert callable(cli.Services()[name])
