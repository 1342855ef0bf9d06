from __future__ import annotations

import periscope_otel as periscope


def test_smoke(captured_telemetry):
    @periscope.monitored("fetch", feed="urlhaus")
    def fetch():
        with periscope.operation("store") as op:
            op.received(3)
            op.ingested(2)

    fetch()
    store = captured_telemetry.operation("store")
    assert store.outcome == "partial"
    assert store.feed == "urlhaus"
    assert store.items.unaccounted == 1
    assert store.is_child_of(captured_telemetry.operation("fetch"))
    assert captured_telemetry.items(feed_name="urlhaus").unaccounted == 1
    assert captured_telemetry.metric("threat.ingest.operation.duration", outcome="ok") == 1
