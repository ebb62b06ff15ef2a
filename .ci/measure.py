# SPDX-License-Identifier: Apache-2.0
"""Compiler launcher: runs a compile job and appends "seconds MiB source" to $BITDECODING_JOB_LOG.

MiB is the peak memory of the job's largest process.
"""

import os
import resource
import subprocess
import sys
import time

start = time.monotonic()
code = subprocess.run(sys.argv[1:], check=False).returncode
seconds = time.monotonic() - start
log = os.environ.get("BITDECODING_JOB_LOG")
if log and "-c" in sys.argv:
    source = sys.argv[sys.argv.index("-c") + 1]
    mebibytes = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss // 1024
    with open(log, "a") as file:
        file.write(f"{seconds:7.1f} {mebibytes:6d} {os.path.basename(source)}\n")
sys.exit(code)
