"""Fork inside an operation; both processes leave its block."""

import os
import sys

import periscope_otel as periscope

periscope.configure()
with periscope.operation("across") as operation:
    operation.received(1)
    operation.ingested(1)
    pid = os.fork()
    if pid == 0:
        with periscope.operation("inside"):
            pass
        if sys.argv[1] == "exit":
            sys.exit(0)
if pid:
    os.waitpid(pid, 0)
    print(os.getpid(), pid, flush=True)
