r"""Waypoint extractors: seconds per MB on texts that are hard to read, and whether time is linear in length.

    python benchmarks/waypoints.py              # 10 shapes of 1 MB of text

A pattern that looks ahead without bound takes time quadratic in the length of the text, so that a single solution
written by a model could stall a run. Every shape is therefore read at an eighth, a quarter, a half and all of the size;
the last column is the ratio of the last two times (2 is linear). Times are CPU seconds of this process, and include what
`waypoints` does with what an extractor finds.
"""

from __future__ import annotations

import argparse
import time

from rich.console import Console
from rich.table import Table

from dail_jax import config
from dail_jax.data.records import Row
from dail_jax.data.waypoints import EXTRACTORS, waypoints

SOLUTION = r"""Let $s$ be the side of the square, so that $s^2 = 2x+1$ and \[\frac{s}{2} = \frac{17}{3} \approx 5.67.\]
There are $\binom{10}{3} = 120$ ways to choose them, of which 1,024 or 40% are even. Therefore the area of triangle
$ABC$ is \begin{align*} K &= \frac12 \cdot 12 \cdot 5 \\ &= 30, \end{align*} and the sum is $30 + 12\sqrt{3} + 7^2 = 79 + 12\sqrt{3}$.
Hence $m + n = \boxed{91}$ by symmetry. 1. First, x = 35/2. 2. Then sqrt(5) is left.
"""
SHAPES = {  # each makes a text of about n characters
    "real": lambda n: SOLUTION * (n // len(SOLUTION)),
    "blanks": lambda n: "x = " + " " * n,
    "digits": lambda n: "so x = " + "1" * n,
    "thousands": lambda n: "x = " + "10," * (n // 3),
    "sums": lambda n: "$" + "1+" * (n // 2) + "$",
    "formulas": lambda n: "$a=1$ " * (n // 6),
    "open braces": lambda n: r"so $x = \frac{" * (n // 14),
    "open brackets": lambda n: "![x](y [img " * (n // 12),
    "environments": lambda n: r"\begin{array}{l} a &= 1 \\ " * (n // 27),
    "words": lambda n: "thus the total of it is **a (b " * (n // 31),
}


def seconds(extractor: str, text: str) -> float:
    started = time.process_time()
    waypoints(
        Row("r", "?", text, None, 0, text if extractor == "file" else None), config.Waypoints(extractor=extractor)
    )
    return time.process_time() - started


def measure(size: int, names: list[str], shapes: list[str], patience: float) -> Table:
    table = Table(title=f"CPU seconds for texts of up to {size:,} characters")
    for column in ("shape", "extractor", "1/8", "1/4", "1/2", "1", "s per MB", "1 to 1/2"):
        table.add_column(column, justify="left" if column in ("shape", "extractor") else "right")
    for shape in shapes:
        for name in names:
            times: list[float] = []
            for part in (8, 4, 2, 1):
                times.append(seconds(name, SHAPES[shape](size // part)))
                if times[-1] > patience:
                    break
            whole = len(times) == 4
            last = times[-1] * 1e6 / (size // 2 ** (4 - len(times)))
            ratio = times[-1] / max(times[-2], 1e-9) if len(times) > 1 else float("nan")
            table.add_row(
                shape,
                name,
                *(f"{t:.3g}" for t in times),
                *("-" for _ in range(4 - len(times))),
                f"{last:.3g}" if whole else f">{last:.3g}",
                f"{ratio:.2f}",
            )
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])  # pyright: ignore
    parser.add_argument("--size", type=int, default=1_000_000)
    parser.add_argument("--patience", type=float, default=60.0, help="CPU seconds after which a size is the last")
    parser.add_argument("--extractors", nargs="*", default=list(EXTRACTORS))
    parser.add_argument("--shapes", nargs="*", default=list(SHAPES))
    args = parser.parse_args()
    Console(width=110).print(measure(args.size, args.extractors, args.shapes, args.patience))


if __name__ == "__main__":
    main()
