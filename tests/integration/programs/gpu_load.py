"""Keep a GPU busy until standard input ends; says what it sees of itself when asked.

Commands: `figures` for this process's own reading, `copy BYTES` to send so much over PCIe.
"""

import json
import os
import sys
import threading

import torch

from periscope_otel.gauges.gpu import GpuReader
from periscope_otel.gauges.nvml import NvmlBackend

BLOCK = 256 * 2**20

stop = threading.Event()
matrix = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
held = torch.empty(2 * 2**30, dtype=torch.uint8, device="cuda")
host = torch.empty(BLOCK, dtype=torch.uint8).pin_memory()
idle = "idle" in sys.argv


def work():
    while not stop.is_set():
        for _ in range(50):
            torch.mm(matrix, matrix)
        torch.cuda.synchronize()


def copy(count):
    for _ in range(count // BLOCK):
        held[:BLOCK].copy_(host, non_blocking=True)
    torch.cuda.synchronize()


def figures():
    stats = reader.read(True)
    return {one.identity.id: one.process_memory for one in stats.devices}


reader = GpuReader(NvmlBackend())
thread = threading.Thread(target=work, daemon=True)
if not idle:
    thread.start()
print(json.dumps({"pid": os.getpid(), "torch": torch.__version__}), flush=True)
for line in sys.stdin:
    command, *arguments = line.split()
    if command == "copy":
        copy(int(arguments[0]))
        print("copied", flush=True)
    else:
        print(json.dumps(figures()), flush=True)
stop.set()
if not idle:
    thread.join()
