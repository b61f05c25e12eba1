"""The hub of this test process. The hub's libraries read where it is when they are imported: import this before."""

import os
import tempfile

import hub

HUB = hub.Hub()
CACHE = tempfile.TemporaryDirectory(prefix="fastkd-hub-")  # nothing of the user's is read or written
os.environ |= {"HF_ENDPOINT": HUB.address, "HF_HOME": CACHE.name, "HF_HUB_DISABLE_XET": "1"}  # it speaks no Xet
