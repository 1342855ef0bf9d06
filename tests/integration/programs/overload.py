"""Emit more spans than the queue holds, and compare the accounts of what became of them.

With the argument `wait` the accounts are compared once every span has been dealt with, as the
metrics page and report() show them; then, and at once without it, by shutdown().
"""

import json
import sys
import time
import urllib.request

import periscope_otel as periscope

EMITTED = 1500

runtime = periscope.configure(prometheus="127.0.0.1:0")
for _ in range(EMITTED):
    with periscope.operation("work"):
        pass


def totals(report):
    (spans,) = [one for one in report.signals if one.signal == "spans"]
    return {
        "exported": spans.exported,
        "failed": spans.failed,
        "dropped": spans.dropped,
        "waiting": spans.waiting,
    }


def page():
    with urllib.request.urlopen(f"http://127.0.0.1:{runtime.server.port}/metrics") as answer:
        return answer.read().decode()


if sys.argv[1] == "wait":
    deadline = time.monotonic() + 50
    while True:
        one = totals(runtime.report())
        if not one["waiting"] and sum(one.values()) == EMITTED:
            break
        if time.monotonic() > deadline:
            print(json.dumps({"never settled": one}))
            sys.exit(1)
        time.sleep(0.02)
    print(json.dumps({"emitted": EMITTED, "report": one, "page": page()}))
else:
    print(json.dumps({"emitted": EMITTED, "report": totals(runtime.shutdown())}))
