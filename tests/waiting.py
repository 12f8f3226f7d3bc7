"Waiting for what happens, and not for a time."

import time

HANGS = 600  # Seconds after which a test gives up: no machine is so busy


def wait_for(true):
    "Until `true()` is true."
    end = time.monotonic() + HANGS
    while not true():
        assert time.monotonic() < end, 'waited in vain'
        time.sleep(0.01)
