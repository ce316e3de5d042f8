"""The fixtures of the self-tests, whose whole runs these tests make longer ones of; and signals as those have them."""

from selftest.conftest import suite as suite
