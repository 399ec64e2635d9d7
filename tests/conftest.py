"""What every test shares: a machine that answers the same way each time."""

import os
import signal
from pathlib import Path

import hypothesis
import pytest

# Before anything imports torch: several ranks on a few cores must not start a thread pool each.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Each connection to a TCPStore asks a name server who 127.0.0.1 is, and waits seconds for one that is slow: ask none.
os.environ["RES_OPTIONS"] = "attempts:0"
# No test may find the credentials of the machine it runs on.
os.environ["AWS_EC2_METADATA_DISABLED"] = "true"
os.environ["AWS_SHARED_CREDENTIALS_FILE"] = os.environ["AWS_CONFIG_FILE"] = os.devnull
os.environ.pop("AWS_PROFILE", None)

# A shell has what it starts in the background ignore interrupts, and whatever is started by that in turn.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# A slow machine is not a bug; and CI is to look at other examples each time, as everybody does.
hypothesis.settings.register_profile("dcpsvc", deadline=None, print_blob=True, derandomize=False)
hypothesis.settings.load_profile("dcpsvc")

S3_TESTS = Path(__file__).parent / "s3"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark everything under tests/s3, so that no file can forget to."""
    for item in items:
        if item.path.is_relative_to(S3_TESTS):
            item.add_marker("s3")
