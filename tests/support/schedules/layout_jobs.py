"""Jobs of rank_pool.py in a process that knows the layout of new_layout.py."""

from __future__ import annotations

import new_layout as new_layout  # registers it
from rank_jobs import attention as attention
