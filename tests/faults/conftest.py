"""The fixtures of the self-tests, whose whole runs these tests make longer ones of."""

import signal

from selftest.conftest import suite as suite

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # Started in the background of a shell: children would inherit it, and the tests of Ctrl-C could not interrupt them.
    signal.signal(signal.SIGINT, signal.default_int_handler)
