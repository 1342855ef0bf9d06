"""Configure, work and shut down, several times over."""

import sys

import periscope_otel as periscope


@periscope.monitored("work", feed="urlhaus")
def work():
    periscope.current_operation().received(2)
    periscope.current_operation().ingested(2)


for count in map(int, sys.argv[1:]):
    periscope.configure()
    for _ in range(count):
        work()
    first = periscope.shutdown()
    again = periscope.shutdown()
    spans = first.signals[0]
    print(spans.exported, first.complete, first == again, flush=True)
