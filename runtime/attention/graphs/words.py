"""How a user says whether layers are played by CUDA graphs."""

from __future__ import annotations

from typing import Literal

GraphsSetting = Literal["auto", "always", "never"]
