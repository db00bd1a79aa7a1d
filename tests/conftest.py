"""What every test is kept from: the user's own cache."""

from __future__ import annotations

import os

os.environ["PROFILING_AGENT_CACHE"] = "off"  # tests that keep widths name a folder of their own
