"""The fixtures of the self-tests, whose whole runs these tests make longer ones of."""

from selftest.conftest import suite as suite
