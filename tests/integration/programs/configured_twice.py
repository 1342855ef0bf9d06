"""Call configure() twice; the arguments of both are in the command line as JSON."""

import json
import logging
import sys

import periscope_otel as periscope

logging.basicConfig(format="%(levelname)s %(message)s", stream=sys.stdout)
first, second = (periscope.configure(**json.loads(one)) for one in sys.argv[1:])
print(first is second)
