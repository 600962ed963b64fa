"""The tiers of tests: every law in its smallest form always, long ones with APPO_TEST_LONG=1, soaks by `make soak`."""

import os

import pytest

LONG = bool(os.environ.get("APPO_TEST_LONG"))
# Worth a continuous integration machine's time, not everybody's.
long = pytest.mark.skipif(not LONG, reason="half a minute to some minutes each: set APPO_TEST_LONG=1")
# What a long test shows as well, and more of it.
short = pytest.mark.skipif(LONG, reason="a long test shows the same, and more")
# Looks for what nobody thought of, until its time is up: `make soak`.
SOAK_MINUTES = float(os.environ.get("APPO_SOAK_MINUTES", "10"))
soak = pytest.mark.skipif(not os.environ.get("APPO_SOAK"), reason="a soak: make soak")
