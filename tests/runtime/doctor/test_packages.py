"""Requirements against installed metadata: real metadata folders, put first on the path."""

from __future__ import annotations

from pathlib import Path

import pytest

from sparsering.runtime.doctor.diagnosis import Finding, diagnose
from sparsering.runtime.doctor.packages import Unmet, install_command, triton_misfit, unmet, versions


def install(folder: Path, name: str, version: str, *requires: str) -> None:
    metadata = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    metadata.mkdir(parents=True)
    lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
    (metadata / "METADATA").write_text("\n".join([*lines, *(f"Requires-Dist: {one}" for one in requires)]) + "\n")


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def test_triton_is_held_to_what_torch_requires(site: Path) -> None:
    install(site, "torch", "2.11.0", 'triton==3.6.0; platform_system != "none"', 'tqdm; extra == "x"')
    install(site, "triton", "3.9.0")
    assert triton_misfit() == Unmet(requirement="triton==3.6.0", installed="3.9.0")
    found = diagnose({"plan": "planner.commands", "run": "runtime.run.command"}, Path())
    told = "triton: torch 2.11.0 requires triton==3.6.0, 3.9.0 is installed"
    assert Finding(told=told, mend="pip install triton==3.6.0") in found.broken
    assert found.verbs == {"plan": "works", "run": "broken"}


def test_a_triton_that_fits_is_none(site: Path) -> None:
    install(site, "torch", "2.11.0", "triton==3.6.0")
    install(site, "triton", "3.6.0")
    assert triton_misfit() is None


def test_a_triton_for_other_platforms_is_none(site: Path) -> None:
    install(site, "torch", "2.11.0", 'triton==3.6.0; platform_system == "none"')
    assert triton_misfit() is None


def test_own_requirements_are_read_from_metadata(site: Path) -> None:
    install(site, "sparsering", "9.0", "numpy>=999", "pydantic>=2", 'no-such>=1b2; extra == "gpu"', 'x; extra == "dev"')
    assert versions()["sparsering"] == "9.0"
    (core,) = unmet()
    assert core.requirement == "numpy>=999" and core.installed == versions()["numpy"]
    assert unmet("gpu") == [Unmet(requirement="no-such>=1b2", installed=None)]
    assert install_command(unmet("gpu")) == "pip install --pre 'no-such>=1b2'"
    found = diagnose({"plan": "planner.commands"}, Path())
    assert found.verbs == {"plan": "broken"}
    assert found.broken[0].told == f"numpy>=999 is required, {core.installed} is installed"


def test_what_is_too_old_is_broken_and_what_is_absent_is_missing(site: Path) -> None:
    install(site, "sparsering", "9.0", 'torch>=999; extra == "gpu"', 'no-such; extra == "gpu"')
    found = diagnose({"run": "runtime.run.command"}, Path())
    assert found.missing == (Finding(told="not installed: no-such", mend="pip install no-such"),)
    assert any(one.told.startswith("torch>=999 is required, ") for one in found.broken)


def test_two_of_a_name_are_asked_for_once() -> None:
    twice = [Unmet(requirement="torch>=2.11", installed=None)] * 2
    assert install_command(twice) == "pip install 'torch>=2.11'"
