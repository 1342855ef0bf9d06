"""Pull three blocklists at once, each under its own feed name, and stream them line by line.

    python examples/feeds.py

One feed is healthy, one answers 503, and one answers 200 with nothing in it: the kind of failure
that no exception reports. The feeds are served by this very process, on 127.0.0.1.
"""

from __future__ import annotations

import asyncio
import ipaddress
from typing import TYPE_CHECKING, NamedTuple

import periscope_otel as periscope
from periscope_otel.monitor.summary import RunSummary

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

FEEDS = {
    "/healthy": (
        200,
        "# worst offenders\n192.0.2.7\n198.51.100.23\n\n203.0.113.256\n2001:db8::bad\n",
    ),
    "/broken": (503, "try again later\n"),
    "/silent": (200, "# no entries\n"),
}


class Response(NamedTuple):
    """What a feed answered; the body is still to be read."""

    status_code: int
    body: asyncio.StreamReader


# feed= as a callable gets the call's arguments by name, so each feed is counted by itself. result=
# looks at what was returned: True means failure, and the response's status becomes `error.type`.
@periscope.monitored(
    "fetch",
    feed=lambda args: args["path"].strip("/"),
    result=lambda response: response.status_code >= 400,
)
async def fetch(port: int, path: str) -> Response:
    """Ask for a feed."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(f"GET {path} HTTP/1.0\r\n\r\n".encode())
    await writer.drain()
    status = int((await reader.readline()).split()[1])
    while (await reader.readline()).strip():
        pass  # the headers
    writer.close()
    return Response(status, reader)


# A generator's span covers the whole stream, but its duration only the time spent in here: what
# the consumer does with a line meanwhile is the attribute `threat.ingest.consumer.duration`.
@periscope.monitored("read")
async def read(response: Response) -> AsyncIterator[str]:
    """Stream the lines of a response."""
    async for line in response.body:
        yield line.decode().strip()


async def pull(port: int, path: str, blocked: set[str]) -> None:
    """Pull one feed into `blocked`."""
    async with periscope.operation("pull", feed=path.strip("/")) as op:
        response = await fetch(port, path)
        if response.status_code >= 400:
            op.fail(response)  # nothing is raised, and yet the pull has failed
            return
        async for line in op.track(read(response)):
            if not line or line.startswith("#"):
                op.skipped(reason="comment")
                continue
            try:
                address = str(ipaddress.ip_address(line))
            except ValueError as error:
                op.failed(line, error)
                continue
            blocked.add(address)
            op.ingested()


async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Answer one request, as the feeds' web server would."""
    path = (await reader.readline()).split()[1].decode()
    status, text = FEEDS[path]
    writer.write(f"HTTP/1.0 {status} -\r\nContent-Type: text/plain\r\n\r\n{text}".encode())
    await writer.drain()
    writer.close()


async def main() -> None:
    """Pull all feeds at once."""
    blocked: set[str] = set()
    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        await asyncio.gather(*(pull(port, path, blocked) for path in FEEDS))
    print(f"blocked: {', '.join(sorted(blocked))}\n")


if __name__ == "__main__":
    with RunSummary(periscope.configure(service_name="feeds")) as summary:
        asyncio.run(main())
    summary.print()
