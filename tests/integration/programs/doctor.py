"""A program that examines itself: each line of standard input is a command in JSON, and so is each
answer.

The arguments are which providers it has and what goes to `configure()`, in JSON. The first line
that it writes is the port of its page.
"""

import ctypes
import itertools
import json
import logging
import multiprocessing
import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

from opentelemetry import metrics, trace
from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader, PeriodicExportingMetricReader
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased

import periscope_otel as periscope
from periscope_otel import guard
from periscope_otel.dead_letter import Letter
from periscope_otel.dead_letter.loss import lose
from periscope_otel.failure import Failure
from periscope_otel.gauges import sampler
from periscope_otel.resilience.breaker import breakers

FAILED = Failure("error", "ConnectTimeout", "failure", retryable=True)
ONCE_AN_HOUR = 3_600_000
kept = []
numbers = itertools.count()


def tracers(*processors, sampler=None):
    made = TracerProvider(sampler=sampler, shutdown_on_exit=False)
    for one in processors:
        made.add_span_processor(one)
    kept.append(made)
    return made


def meters(*readers):
    made = MeterProvider(readers or [InMemoryMetricReader()], shutdown_on_exit=False)
    kept.append(made)
    return made


def batch(place="first"):
    exporter = OTLPSpanExporter(endpoint=f"{endpoint}/{place}/v1/traces")
    return BatchSpanProcessor(exporter, schedule_delay_millis=ONCE_AN_HOUR)


def periodic(place="first"):
    exporter = OTLPMetricExporter(endpoint=f"{endpoint}/{place}/v1/metrics")
    return PeriodicExportingMetricReader(exporter, ONCE_AN_HOUR)


def make_global(tracer_provider, meter_provider):
    trace.set_tracer_provider(tracer_provider)
    metrics.set_meter_provider(meter_provider)


def given(tracer_provider, meter_provider):
    return {"tracer_provider": tracer_provider, "meter_provider": meter_provider}


def others():
    """Make the providers in use others than the global ones."""
    make_global(tracers(), meters())
    return given(tracers(), meters())


def given_and_global():
    mine = given(tracers(), meters())
    make_global(*mine.values())
    return mine


def in_the_path():
    exporter = OTLPSpanExporter(endpoint=f"{endpoint}/v1/traces")
    return given(tracers(SimpleSpanProcessor(exporter)), meters())


PROVIDERS = {
    "built": dict,
    "given": lambda: given(tracers(), meters()),
    "global": lambda: make_global(tracers(), meters()) or {},
    "given and global": given_and_global,
    "others": others,
    "twice": lambda: given(tracers(batch(), batch()), meters(periodic(), periodic())),
    "two places": lambda: given(
        tracers(batch("first"), batch("second")), meters(periodic("first"), periodic("second"))
    ),
    "in the path": in_the_path,
    "in memory": lambda: given(tracers(SimpleSpanProcessor(InMemorySpanExporter())), meters()),
    "sampled": lambda: given(tracers(sampler=ParentBased(TraceIdRatioBased(0.1))), meters()),
}
"""What a kind of program gives to `configure()`."""


def examine(timeout=5.0):
    diagnosis = runtime.examine(timeout=timeout)
    return [
        {name: getattr(one, name) for name in ("check", "status", "message", "remedy")}
        for one in diagnosis.findings
    ]


def examine_in_child(timeout):
    """Examine in the child of a fork."""
    out, into = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.write(into, json.dumps(examine(timeout)).encode())
        finally:
            os._exit(0)
    os.close(into)
    with os.fdopen(out) as answer:
        told = json.load(answer)
    os.waitpid(pid, 0)
    return told


def examine_at_once(count):
    """Examine in several threads at the same time; returns how many findings each has got."""
    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(len, pool.map(lambda _: examine(10.0), range(count))))


def examine_while_busy(count):
    """Examine while other threads compute; returns what went wrong in those."""
    done, wrong = threading.Event(), []

    def compute():
        while not done.is_set():
            try:
                assert sum(tuple(one for one in range(500))) == 124_750
            except BaseException as error:
                wrong.append(repr(error))

    threads = [threading.Thread(target=compute) for _ in range(2)]
    for one in threads:
        one.start()
    try:
        for _ in range(count):
            examine(10.0)
    finally:
        done.set()
        for one in threads:
            one.join()
    return wrong


def more_providers():
    """Have a provider of each kind export that nobody knows of."""
    tracers(batch("other"))
    meters(periodic("other"))


def work(names):
    for name in names:
        with periscope.operation(name, feed="urlhaus"):
            pass
    runtime.flush(30)


def spans(count):
    for _ in range(count):
        runtime.tracer_provider.get_tracer("app").start_span("one").end()


def exported():
    return [[one.signal, one.exported, one.failed] for one in runtime.report().signals]


def letters(count):
    @periscope.monitored("store", feed="urlhaus", dead_letter=True)
    def store(url):
        raise ValueError("as told")

    for _ in range(count):
        try:
            store(f"http://malware.example/{next(numbers)}")
        except ValueError:
            continue


def lose_letters(count):
    for number in range(count):
        lose(Letter(id=str(number), operation="store", codec="item"), "full", "as told")


def internal_error():
    guard.report("a place", ValueError("as told"))


def open_breaker(name):
    breaker = breakers.get(name)
    for _ in range(5):
        breaker.acquire().settle(FAILED)
    kept.append(breaker)
    return breaker.state


def start_method(name):
    multiprocessing.set_start_method(name, force=True)


def instrument():
    """Have other instrumentations make spans of what goes over the network."""
    from opentelemetry.instrumentation.redis import RedisInstrumentor
    from opentelemetry.instrumentation.requests import RequestsInstrumentor
    from opentelemetry.instrumentation.urllib3 import URLLib3Instrumentor

    for one in (RedisInstrumentor, RequestsInstrumentor, URLLib3Instrumentor):
        one().instrument(tracer_provider=runtime.tracer_provider)


def begin_journalled():
    """Write a payload to the journal, and work on it for ever."""
    begun = threading.Event()

    @periscope.monitored("hang", feed="urlhaus", dead_letter=True, journal=True)
    def hang(url):
        begun.set()
        threading.Event().wait()

    threading.Thread(target=hang, args=("http://malware.example/",), daemon=True).start()
    return begun.wait(30)


def faster_gauges(patience):
    """Read every tenth of a second, and take what needs more than some seconds to hang."""
    sampler.LEAST_PATIENCE = patience
    handle = periscope.instrument_gauges(
        meter_provider=runtime.meter_provider, gauges=runtime.settings.gauges, interval=0.1
    )
    kept.append(handle)


def stub(function, *arguments):
    plain = [one.encode() if isinstance(one, str) else ctypes.c_longlong(one) for one in arguments]
    return getattr(ctypes.CDLL("libnvidia-ml.so.1"), f"stub_{function}")(*plain)


def logs():
    return lines.lines


class Lines(logging.Handler):
    def __init__(self):
        super().__init__()
        self.lines = []

    def emit(self, record):
        self.lines.append(f"{record.levelname} {record.getMessage()}")


lines = Lines()
logging.getLogger().addHandler(lines)
logging.getLogger().setLevel(logging.INFO)
kind, keywords = sys.argv[1], json.loads(sys.argv[2])
endpoint = os.environ.get("ENDPOINT", "http://127.0.0.1:1")
runtime = periscope.configure(**PROVIDERS[kind](), **keywords)
print(runtime.server.port if runtime.server else 0, flush=True)
commands = {
    one.__name__: one
    for one in (
        *(examine, examine_in_child, examine_at_once, examine_while_busy, more_providers),
        *(work, spans, exported, letters, lose_letters, internal_error, open_breaker),
        *(start_method, instrument, begin_journalled, faster_gauges, stub, logs),
    )
}
for line in sys.stdin:
    name, *arguments = json.loads(line)
    print(json.dumps(commands[name](*arguments)), flush=True)
