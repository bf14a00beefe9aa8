"""The least that a weighted average can cost: a chunked sum over files that are all laid out alike, and nothing else.

    python benchmarks/floor.py OUT MODEL MODEL…

No checks, no hashes, no other formats: every file must hold bfloat16 tensors in the same order at the same places.
"""

from __future__ import annotations

import os
import shutil
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

CHUNK = 1 << 22  # numbers at a time
THREADS = 2


def average(output: Path, models: list[Path]) -> None:
    """Write the mean of the models, file by file and chunk by chunk, summed in float32."""
    torch.set_num_threads(1)
    own = threading.local()
    output.mkdir(parents=True)
    shutil.copy(models[0] / "config.json", output)
    for path in sorted(models[0].glob("*.safetensors")):
        inputs = [os.open(model / path.name, os.O_RDONLY) for model in models]
        target = os.open(output / path.name, os.O_RDWR | os.O_CREAT)
        size = path.stat().st_size
        start = 8 + int.from_bytes(os.pread(inputs[0], 8, 0), "little")
        os.pwrite(target, os.pread(inputs[0], start, 0), 0)
        os.ftruncate(target, size)

        def work(at: int, inputs: list[int] = inputs, target: int = target, size: int = size) -> None:
            if not hasattr(own, "buffers"):
                own.buffers = torch.empty(CHUNK, dtype=torch.bfloat16), torch.empty(CHUNK)
            count = min(CHUNK, (size - at) // 2)
            chunk, total = (buffer[:count] for buffer in own.buffers)
            view = memoryview(chunk.view(torch.uint8).numpy())
            for number, file in enumerate(inputs):
                os.preadv(file, [view], at)
                if number:
                    total.add_(chunk)
                else:
                    total.copy_(chunk)
            chunk.copy_(total.mul_(1 / len(inputs)))
            os.pwrite(target, view, at)

        with ThreadPoolExecutor(THREADS) as pool:
            list(pool.map(work, range(start, size, 2 * CHUNK)))


if __name__ == "__main__":
    average(Path(sys.argv[1]), [Path(argument) for argument in sys.argv[2:]])
