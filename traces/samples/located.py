"""Where samples lie: folders beside this file, each a whole trace with its manifest. README.md tells what they are."""

from __future__ import annotations

from pathlib import Path

from ..errors import unknown_name

PREFIX = "sample:"
SAMPLES = Path(__file__).parent


def sample_names() -> list[str]:
    """Return the names of all samples, in alphabetical order."""
    return sorted(path.parent.name for path in SAMPLES.glob("*/manifest.json"))


def located(folder: Path | str) -> Path:
    """Return the folder that a name such as `sample:real-135m` stands for; any other path as it is.

    Raises InputError for a sample that does not exist; it lists those that do.
    """
    text = str(folder)
    if not text.startswith(PREFIX):
        return Path(folder)
    name = text.removeprefix(PREFIX)
    if name not in sample_names():
        raise unknown_name(name, sample_names(), source=text)
    return SAMPLES / name
