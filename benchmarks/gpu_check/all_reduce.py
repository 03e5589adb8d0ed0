"""A member of a process group that adds up a tensor.

    python -m benchmarks.gpu_check.all_reduce RANK WORLD PORT DEVICE MIB

It prints a line of JSON: how many numbers are wrong, and GB/s of the algorithm (bytes of the tensor over seconds).
"""

from __future__ import annotations

import datetime
import json
import sys
import time

import torch
import torch.distributed as dist

REPEATS = 10
TIMEOUT = datetime.timedelta(seconds=120)


def main() -> None:
    rank, world, port = map(int, sys.argv[1:4])
    device, mib = sys.argv[4], int(sys.argv[5])
    on_cards = device == "cuda"
    place = torch.device(device, rank) if on_cards else torch.device(device)
    if on_cards:
        torch.cuda.set_device(place)
    dist.init_process_group(
        "nccl" if on_cards else "gloo",
        init_method=f"tcp://127.0.0.1:{port}",
        rank=rank,
        world_size=world,
        timeout=TIMEOUT,
    )
    # Each rank adds another power of two: a sum that lacks a rank is wrong everywhere.
    numbers = torch.full((mib * 2**18,), float(2**rank), device=place)
    dist.all_reduce(numbers)
    wrong = int((numbers != 2**world - 1).sum())
    began = time.perf_counter()
    for _ in range(REPEATS):
        dist.all_reduce(numbers)
    if on_cards:
        torch.cuda.synchronize()
    rate = numbers.nbytes * REPEATS / (time.perf_counter() - began) / 1e9
    dist.destroy_process_group()
    print(json.dumps({"wrong": wrong, "gb_s": rate}), flush=True)


if __name__ == "__main__":
    main()
