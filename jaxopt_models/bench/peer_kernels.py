"""The peers of `bench.kernels`, in a process and an environment of their own.

Imports nothing of this package but `alone` and `peer_products` beside it. Reads problems from
standard input and writes what it finds to standard output, both one JSON object a line, each as
soon as it is known:

    {"format": "int4", "n": 4096, "k": 4096, "ms": [1, 16], "without": ["gemlite"], "only": []}
    {"ceilings": true}

    {"unusable": "no module named torch"}      instead of everything else
    {"versions": {...}, "device": "..."}       once, at the start
    {"start": "humming"}                       so that it is known who brought the process down
    {"peer": "humming", "m": 1, "us": 9.3, "error": 0.11, "clock": "CUPTI"}
    {"peer": "gemlite", "m": 1, "reason": "No module named 'gemlite'"}
    {"ceilings": {"bf16_tflops": 790.1}}
    {"done": true}                             after each problem

A time is that of a call's kernels together, without gaps, as the CUDA profiler (CUPTI) counts them:
the mean over copies of the weight, the median of five rounds; or their mean, if it does not see as
many in each ("CUPTI, mean"). Where it sees none, it is that of a CUDA graph of the same calls
between two events ("CUDA graph"), gaps included. A product whose relative error is that of a wrong
call is refused.
"""

import importlib.metadata
import json
import os
import statistics
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

_ROUNDS = 5
# Relative errors of random numbers are a half of these; those of a wrong layout are above 1.
_TOLERANCE = {"bf16": 0.01, "fp8": 0.1, "int8": 0.04, "int4": 0.25, "nvfp4": 0.25, "mxfp4": 0.3}
_PACKAGES = ("torch", "triton", "gemlite", "humming-kernels")
_CEILING = 8192

Tell = Callable[..., None]


def main() -> None:
    lines = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever peers print is not for the reader of these lines

    def tell(**line: Any) -> None:
        print(json.dumps(line), file=lines, flush=True)

    try:
        import torch  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        return tell(unusable=str(error))
    if not torch.cuda.is_available():
        return tell(unusable=f"torch {torch.__version__} sees no GPU")
    versions = {name: _version(name) for name in _PACKAGES}
    tell(versions=versions, device=torch.cuda.get_device_name())
    _kernels(lambda: torch.ones(1, device="cuda"))  # the profiler's first session may miss some
    for line in sys.stdin:
        problem = json.loads(line)
        if "ceilings" in problem:
            tell(ceilings=ceilings(tell))
        else:
            serve(problem, tell)
        tell(done=True)


def serve(problem: dict[str, Any], tell: Tell) -> None:
    """Times every peer that has the format."""
    import torch  # pyright: ignore[reportMissingImports]
    from peer_products import PEERS, humming_needs

    form, n, k = problem["format"], problem["n"], problem["k"]
    torch.manual_seed(0)
    w = torch.randn(n, k, dtype=torch.bfloat16, device="cuda")
    for name, (formats, build) in PEERS.items():
        asked = not problem["only"] or name in problem["only"]
        if form not in formats or not asked or name in problem["without"]:
            continue
        tell(start=name)
        m = None
        try:
            product = build(w, form)
            for m in problem["ms"]:
                try:
                    tell(peer=name, m=m, **measured(product, w, m, _TOLERANCE[form]))
                except Exception as error:
                    tell(peer=name, m=m, reason=_reason(error))
                    torch.cuda.synchronize()
        except Exception as error:
            needs = f"; {humming_needs()}" if name == "humming" else ""
            tell(peer=name, m=None, reason=_reason(error) + needs)
        product = None
        torch.cuda.synchronize()  # fails after an illegal access, and with it this process
        torch.cuda.empty_cache()


def measured(product: Any, w: Any, m: int, tolerance: float) -> dict[str, Any]:
    """`{us, clock, error}`, or `{reason}` for a wrong result."""
    import torch  # pyright: ignore[reportMissingImports]
    from alone import alone

    x = torch.randn(m, w.shape[1], dtype=torch.bfloat16, device="cuda")
    operand = product.prepare(x)

    def once() -> None:
        for weight in product.weights:
            product.run(operand, weight)

    if not product.tunes:
        product.run(operand, product.weights[0])  # compiles, while others measure
        torch.cuda.synchronize()
    with alone():
        found = product.finish(product.run(operand, product.weights[0]), operand).float()
        exact = x.float() @ w.float().t()
        error = float((found - exact).norm() / exact.norm())
        if not error <= tolerance:
            return {"reason": f"wrong result: relative error {error:.3g}, tolerated {tolerance}"}
        us, clock = microseconds(once)
    return {"us": us / len(product.weights), "clock": clock, "error": error}


def microseconds(once: Callable[[], Any]) -> tuple[float, str]:
    """Time of the kernels of `once`, and by which clock."""
    import torch  # pyright: ignore[reportMissingImports]

    once()  # compiles and tunes
    torch.cuda.synchronize()
    times = _kernels(once)
    if not times:
        return _graph_microseconds(once), "CUDA graph"
    if len(times) % _ROUNDS:
        return sum(times) / _ROUNDS, "CUPTI, mean"
    size = len(times) // _ROUNDS
    rounds = [times[i * size : (i + 1) * size] for i in range(_ROUNDS)]
    return statistics.median(map(sum, rounds)), "CUPTI"


def _kernels(once: Callable[[], Any]) -> list[float]:
    """Microseconds of each kernel of the rounds, in the order in which they ran."""
    import torch  # pyright: ignore[reportMissingImports]

    kinds = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=kinds) as profile:
        for _ in range(_ROUNDS):
            once()
        torch.cuda.synchronize()
    on_gpu = [
        event
        for event in profile.events()
        if event.device_type == torch.autograd.DeviceType.CUDA and "Sync" not in event.name
    ]
    on_gpu.sort(key=lambda event: event.time_range.start)
    return [event.time_range.elapsed_us() for event in on_gpu]


def _graph_microseconds(once: Callable[[], Any]) -> float:
    import torch  # pyright: ignore[reportMissingImports]

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        once()
    times = []
    for _ in range(_ROUNDS + 1):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) * 1e3)
    return statistics.median(times[1:])


def ceilings(tell: Tell) -> dict[str, float]:
    """Rates of large products in 10^12 operations a second, for each type that works."""
    import torch  # pyright: ignore[reportMissingImports]
    from peer_products import PEERS

    w = torch.randn(_CEILING, _CEILING, dtype=torch.bfloat16, device="cuda")
    found = {}
    for rate, name in (
        ("bf16_tflops", "torch bf16"),
        ("fp8_tflops", "torch fp8 tensor"),
        ("int8_tops", "torch int8"),
    ):
        tell(start=name)
        try:
            product = PEERS[name][1](w, "")
            us, _ = microseconds(partial(product.run, product.prepare(w), product.weights[0]))
            found[rate] = 2 * _CEILING**3 / us / 1e6
        except Exception as error:
            tell(peer=name, m=_CEILING, reason=_reason(error))
    return found


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {' '.join(lines)[:600]}"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


if __name__ == "__main__":
    main()
