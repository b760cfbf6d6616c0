"""The recursion against a dense least-squares solve of the same layers, and against its floor.

    python -m benchmarks.timing.dense                         CNN6 and LeNet
    python -m benchmarks.timing.dense --network lenet --output lenet.jsonl

One photograph, B = 1, a float32 gradient.  Four routes are timed, each measurement in a process of
its own (``timing.dense_measure``):

* ``rgap.recursion.descend`` from the head that rgap found, until the data is there;
* ``rgap.invert`` end to end, with head, polish and certificate;
* ``scipy.linalg.lstsq`` of the stacked dense matrix [K; W] of every layer below the head, given
  the true cotangents and pre-activations; the table of routes counts the building of the matrix, as
  it does for rgap, the table of layers the solve alone;
* one Cholesky factorisation of every size that the recursion factored: the floor of any route that
  factors the normal equations once.

A dense solve over the limit of time or memory is extrapolated from the flop count of its LAPACK
driver, at the rate of the largest layer that ran, and marked ≈.  Nothing is asserted on time.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.common.arguments import Arguments
from benchmarks.common.json_lines import append
from benchmarks.common.measuring import GIB, run_script

# Neither torch nor rgap here: on Linux ru_maxrss survives exec, so a large parent would hide what
# its children use.
if TYPE_CHECKING:
    from rich.table import Table

Json = dict[str, Any]
NETWORKS = ("cnn6", "lenet")
DRIVERS = ("gelsd", "gelsy")
AROUND = 120  # seconds that imports, capture and building may add to the limit of a solve
MEASURE = "benchmarks.timing.dense_measure"
POOLS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")


class OverLimitError(Exception):
    """A measurement took more time or memory than allowed."""


def main() -> int:
    """Measure, print, write."""
    parser = Arguments(__doc__, network=["lenet"], repeat=1, memory=0.05, threads=1)
    parser.several("--network", NETWORKS, "which")
    parser.add_argument("--limit", type=float, default=300, help="seconds of one dense solve")
    parser.add_argument("--memory", type=float, default=12, help="GiB of one dense solve")
    parser.add_argument("--threads", type=int, default=2, help="of torch and of SciPy")
    parser.add_argument("--repeat", type=int, default=3, help="runs of rgap; the fastest counts")
    parser.add_argument("--dense-repeat", type=int, default=1, help="the same, of a dense solve")
    parser.output()
    options = parser.parse_args()
    bench = Bench(
        options.threads, options.limit, options.memory, options.repeat, options.dense_repeat
    )
    report: Json = {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": options.threads,
        "repeat": options.repeat,
        "dense_repeat": options.dense_repeat,
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
        "time": time.strftime("%Y-%m-%d %H:%M"),
        "networks": {name: bench.network(name) for name in options.network},
    }
    show(report)
    append(options.output, [report])
    return 0


class Bench:
    """Runs the measurements one after the other."""

    def __init__(
        self, threads: int, limit: float, memory: float, repeat: int, dense_repeat: int
    ) -> None:
        if min(threads, repeat, dense_repeat) < 1 or min(limit, memory) <= 0:
            raise SystemExit(
                "expected positive --threads, --repeat, --dense-repeat, --limit and --memory, got "
                f"{threads}, {repeat}, {dense_repeat}, {limit} and {memory}; write --threads 2"
            )
        self.environment = os.environ | dict.fromkeys(POOLS, str(threads))
        self.limit, self.memory = limit, memory
        self.repeat, self.dense_repeat = repeat, dense_repeat

    def run(self, *what: object, limit: float | None = None) -> Json:
        """One measurement in a fresh process.

        Raises:
            OverLimitError: it took longer than ``limit`` seconds, or was killed for its memory.
            RuntimeError: it failed for any other reason, with what it said.
        """
        words = [str(word) for word in what]
        print("measuring", *words, file=sys.stderr, flush=True)
        try:
            done = run_script(
                MEASURE, words, env=self.environment, capture_output=True,
                timeout=None if limit is None else limit + AROUND,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            raise OverLimitError from None
        if done.returncode == -9 or "MemoryError" in done.stderr:
            raise OverLimitError
        if done.returncode != 0:
            raise RuntimeError(f"{' '.join(words)} failed:\n{done.stderr}")
        result: Json = json.loads(done.stdout.splitlines()[-1])
        if limit is not None and result["seconds"] > limit:
            raise OverLimitError
        return result

    def network(self, name: str) -> Json:
        """Every route of one network."""
        again = range(self.repeat)
        descents = [self.run("recursion", name) for _ in again]
        inversions = [self.run("end_to_end", name) for _ in again]
        descent = fastest(descents)
        layers = descent.pop("layers")
        floors = {
            size: fastest([self.run("cholesky", *size) for _ in again])
            for size in {tuple(layer["factored"]) for layer in layers}
            if size
        }
        for layer in layers:
            layer["floor"] = floors.get(tuple(layer["factored"]))
        for driver in DRIVERS:
            self.dense(name, driver, layers)
        return {
            "recursion": descent,
            "invert": fastest(inversions),
            "runs": {
                "recursion": [run["seconds"] for run in descents],
                "invert": [run["seconds"] for run in inversions],
            },
            "layers": layers,
        }

    def dense(self, name: str, driver: str, layers: list[Json]) -> None:
        """Add the dense solve of every layer, measured or extrapolated."""
        ran: Json | None = None
        over = False
        for layer in sorted(layers, key=lambda layer: flops(driver, layer)):
            bulky = layer["rows"] * layer["unknowns"] * 8 > self.memory * GIB
            if not over and not bulky:
                try:
                    solve = fastest(
                        [
                            self.run("dense", name, layer["index"], driver, limit=self.limit)
                            for _ in range(self.dense_repeat)
                        ]
                    )
                except OverLimitError:
                    over = True
                else:
                    layer[driver], ran = {**solve, "measured": True}, layer
                    continue
            layer[driver] = {"measured": False, "seconds": None, "increment": 0.0, "peak": 0.0}
            if ran is not None:
                rate = ran[driver]["seconds"] / flops(driver, ran)
                layer[driver]["seconds"] = rate * flops(driver, layer)


def flops(driver: str, layer: Json) -> float:
    """Leading terms of LAPACK's count for an m × n least-squares problem, m ≥ n.

    ``gelsy``: a QR factorisation with column pivoting.  ``gelsd``: bidiagonalisation, after a QR
    factorisation where m is much larger than n.
    """
    m, n = float(layer["rows"]), float(layer["unknowns"])
    m, n = max(m, n), min(m, n)
    qr = 2 * n * n * (m - n / 3)
    if driver == "gelsy":
        return qr
    return min(2 * qr, qr + 8 / 3 * n**3)


def fastest(runs: list[Json]) -> Json:
    """The run that was disturbed least."""
    return dict(min(runs, key=lambda run: float(run["seconds"])))


def cpu_name() -> str:
    """As the operating system knows it."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def show(report: Json) -> None:
    """Print the table, the layers behind it, and what was measured on what."""
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(overview(report["networks"]))
    console.print(by_layer(report["networks"]))
    networks = list(report["networks"].values())
    pools = ", ".join(networks[0]["recursion"]["pools"])
    console.print(
        f"{report['cpu']}, {report['cores']} cores; thread pools: {pools}; load before the first "
        f"measurement {report['load']:.2f}, other processes' CPUs while measuring at most "
        f"{max(others(networks)):.2f}. Fastest of {report['repeat']} processes, dense of "
        f"{report['dense_repeat']}.",
        style="dim", highlight=False,
    )  # fmt: skip
    if any(
        not layer[d]["measured"] for net in networks for layer in net["layers"] for d in DRIVERS
    ):
        console.print("≈ extrapolated by LAPACK's flop count from the largest layer that ran.")


def overview(networks: Json) -> Table:
    """One row per route and network."""
    from rich.table import Table

    table = Table(title="Recovering one photograph from a float32 gradient, B = 1")
    for head in ("network", "route"):
        table.add_column(head)
    for head in ("seconds", "ratio", "PSNR dB", "status", "peak MiB", "increment"):
        table.add_column(head, justify="right")
    for name, net in networks.items():
        alone, whole = net["recursion"], net["invert"]
        seconds = alone["seconds"]
        floor = sum(one["floor"]["seconds"] for one in net["layers"] if one["floor"])
        psnr = "-" if whole["psnr"] is None else f"{whole['psnr']:.1f}"
        table.add_row(
            name, "rgap, recursion alone", f"{seconds:.2f}", f"{seconds / floor:.1f} × floor",
            f"{alone['psnr']:.1f}", "-", *memory(alone),
        )  # fmt: skip
        table.add_row(
            "", "rgap.invert, certified", f"{whole['seconds']:.2f}",
            f"{whole['seconds'] / floor:.1f} × floor", psnr, whole["status"], *memory(whole),
        )  # fmt: skip
        for driver in DRIVERS:
            solves = [layer[driver] for layer in net["layers"]]
            largest = max(solves, key=lambda one: float(one["peak"]))
            label = f"dense lstsq, {driver}"
            if any(one["seconds"] is None for one in solves):
                table.add_row("", label, "over the limit", "", "", "", *memory(largest))
                continue
            mark = "" if all(one["measured"] for one in solves) else "≈ "
            total = sum(one["seconds"] + one.get("build", 0.0) for one in solves)
            table.add_row(
                "", label, f"{mark}{total:.2f}", f"{mark}{total / seconds:.1f} × recursion",
                "-", "-", *memory(largest),
            )  # fmt: skip
        table.add_row("", "floor: Cholesky alone", f"{floor:.2f}", "", "", "", "", "")
        table.add_section()
    return table


def memory(run: Json) -> tuple[str, str]:
    """Peak and increment, MiB."""
    return (f"{run['peak']:.0f}", f"{run['increment']:.0f}") if run["peak"] else ("-", "-")


def by_layer(networks: Json) -> Table:
    """One row per layer: seconds of every route."""
    from rich.table import Table

    table = Table(title="Layer by layer, seconds")
    for head in ("network", "layer"):
        table.add_column(head)
    for head in ("[K; W]", "rgap", *DRIVERS, "Cholesky", "of size"):
        table.add_column(head, justify="right")
    for name, net in networks.items():
        for layer in net["layers"]:
            blocks, size = [1, 1, *layer["factored"]][-3::2]
            row = [name, layer["layer"], f"{layer['rows']}×{layer['unknowns']}"]
            row.append(f"{layer['seconds']:.2f}")
            for driver in DRIVERS:
                solve = layer[driver]
                mark = "" if solve["measured"] else "≈ "
                row.append("-" if solve["seconds"] is None else f"{mark}{solve['seconds']:.2f}")
            floor = layer["floor"]
            row += ["-" if floor is None else f"{floor['seconds']:.3f}"]
            row.append(f"{size}²" if blocks == 1 else f"{blocks}×{size}²")
            table.add_row(*row)
        table.add_section()
    return table


def others(networks: list[Json]) -> list[float]:
    """CPUs that other processes kept busy during each measurement."""
    runs = [net[route] for net in networks for route in ("recursion", "invert")]
    runs += [layer[driver] for net in networks for layer in net["layers"] for driver in DRIVERS]
    return [float(run.get("others", 0.0)) for run in runs]


if __name__ == "__main__":
    sys.exit(main())
