"""Every public entry point on every idiom of tests/support/idioms.py: an answer or one sentence.

    python -m benchmarks.sweeps.idioms                         all × all, some minutes
    python -m benchmarks.sweeps.idioms --idioms tuple dict --points match labels

An error counts as a sentence if it is a ValueError or a TypeError that was raised by a line of this
package.  Where an answer is ``EXACT`` its inputs are compared with the true ones.  The last lines
are the counts; the exit code is 1 if anything failed.
"""

from __future__ import annotations

import signal
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from idioms import CROSS, IDIOMS, Idiom, logits_of
from torch import Tensor, nn

import rgap
from benchmarks.common.arguments import Arguments
from benchmarks.common.judging import match
from rgap import analysis

ROOT = Path(rgap.__file__).parents[1]
FOLDERS = tuple(str(ROOT / name) + "/" for name in ("rgap", "analysis", "solvers"))
CLOSE = 1e-4  # of an EXACT answer to the truth
SECONDS = 60  # for one call, after which it counts as a failure


def targets_for(idiom: Idiom, outputs: Tensor) -> Tensor:
    """Targets that the loss takes for these outputs."""
    count = len(outputs)
    if idiom.loss == CROSS and outputs.ndim > 1:
        shape = (count, *outputs.shape[2:])
        index = torch.arange(torch.Size(shape).numel()) % outputs.shape[1]
        return index.reshape(shape)
    places = torch.arange(outputs.numel(), dtype=torch.float64).reshape(outputs.shape)
    dense = places % 2 if "binary" in idiom.loss else places.sin() / 2 + 0.5
    return dense.flatten() if outputs.shape[-1] == 1 else dense


def sent(idiom: Idiom, model: nn.Module, count: int) -> tuple[Tensor, rgap.Update]:
    """The truth and an update: captured, or made by hand where capture refuses.

    By hand every parameter has a gradient, of ones where PyTorch gives none, so that the other
    entry points are reached at all.
    """
    inputs = idiom.inputs(count)
    data = inputs if idiom.tokens else inputs.float()
    try:
        with torch.no_grad():
            outputs = logits_of(model(data))
    except Exception:
        outputs = torch.zeros(count, 3)
    targets = targets_for(idiom, outputs)
    if idiom.loss != CROSS:
        targets = targets.float()
    try:
        return inputs, rgap.capture(model, data, targets, idiom.loss)
    except (ValueError, TypeError):
        pass
    gradients = {n: torch.ones(p.shape) for n, p in model.named_parameters()
                 if not isinstance(p, nn.parameter.UninitializedParameter)}  # fmt: skip
    try:
        loss = rgap.Loss(idiom.loss)(logits_of(model(data)), targets)
        leaves = dict(model.named_parameters())
        given = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
        gradients.update({n: g for n, g in zip(leaves, given, strict=True) if g is not None})
    except Exception:
        pass
    gradients = gradients or {"weight": torch.ones(1)}
    update = rgap.Update(gradients, batch_size=count, loss=idiom.loss, input_shape=idiom.shape)
    return inputs, update


Call = Callable[[Idiom, nn.Module, rgap.Update], Any]


def _capture(idiom: Idiom, model: nn.Module, _: rgap.Update) -> object:
    inputs = idiom.inputs(2) if idiom.tokens else idiom.inputs(2).float()
    return rgap.capture(model, inputs, torch.tensor([0, 1]), idiom.loss)


def _explain(_: Idiom, model: nn.Module, update: rgap.Update) -> object:
    return analysis.explain(rgap.invert(model, update), model, update)


def _method(name: str) -> Call:
    return lambda idiom, model, update: rgap.labels.estimate(model, update, method=name)


def _idlg(_: Idiom, model: nn.Module, update: rgap.Update) -> object:
    weight = next((g for g in reversed(update.gradients.values()) if g.ndim == 2), None)
    return None if weight is None else rgap.idlg(weight)


POINTS: dict[str, Call] = {
    "capture": _capture,
    "invert": lambda i, m, u: rgap.invert(m, u),
    "complete": lambda i, m, u: rgap.invert(m, u, complete=True, time_limit=0.5),
    "match": lambda i, m, u: rgap.match(m, u, iterations=1),
    "match ig": lambda i, m, u: rgap.match(m, u, method="ig", iterations=1),
    "match dlg": lambda i, m, u: rgap.match(m, u, method="dlg", iterations=1),
    **{f"labels {name}": _method(name) for name in rgap.labels.METHODS},
    "idlg": _idlg,
    "audit": lambda i, m, u: analysis.audit(m, i.shape, (1, 2), loss=i.loss),
    "identifiability": lambda i, m, u: analysis.identifiability(m, i.shape, 1, loss=i.loss),
    "noise": lambda i, m, u: analysis.noise(m, i.shape, 1, sigma=0.01, loss=i.loss),
    "symbolic": lambda i, m, u: analysis.symbolic(m, i.shape, 2),
    "generic_ranks": lambda i, m, u: analysis.generic_ranks(m, i.shape, 1, loss=i.loss),
    "explain": _explain,
    "harden": lambda i, m, u: analysis.harden(m, i.shape, loss=i.loss, largest_batch=4),
}
"""Every entry point, on a model and the update of two samples."""
SINGLE = ("invert", "explain", "match")
"""Those that are also tried on one sample."""


def verdict(call: Callable[[], Any], truth: Tensor | None) -> str:
    """``answer``, ``sentence``, or what is wrong."""
    try:
        with warnings.catch_warnings(), limited(SECONDS):
            warnings.simplefilter("ignore")
            answer = call()
    except (ValueError, TypeError) as error:
        frames = traceback.extract_tb(error.__traceback__)
        ours = frames[-1].filename.startswith(FOLDERS)
        if ours and len(str(error)) > 20:
            return "sentence"
        return f"{type(error).__name__} from {place(error)}: {str(error)[:150]}"
    except (Exception, TooLong) as error:
        return f"{type(error).__name__} from {place(error)}: {str(error)[:150]}"
    certified = isinstance(answer, rgap.Recovery) and answer.status is rgap.Status.EXACT
    if certified and truth is not None:
        return wrong(answer, truth) or "answer"
    return "answer"


def wrong(recovery: rgap.Recovery, truth: Tensor) -> str:
    """How far an EXACT answer is off, or nothing."""
    assert recovery.inputs is not None
    beside = match(recovery.inputs, None, truth, truth)
    if not beside.once:
        return f"EXACT with {len(recovery.inputs)} samples of {len(truth)}"
    bound = max(CLOSE, recovery.error_bound or 0.0)
    return (
        "" if beside.worst < bound else f"EXACT and off by {beside.worst:.1e}, stated {bound:.1e}"
    )


def place(error: BaseException) -> str:
    """The innermost line of this package, and the innermost of all."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [f for f in frames if f.filename.startswith(FOLDERS)]
    last = frames[-1]
    own = f"{Path(ours[-1].filename).name}:{ours[-1].lineno}" if ours else "nowhere"
    return f"{own} ({Path(last.filename).name}:{last.lineno})"


class TooLong(BaseException):
    """A call took longer than it may."""


@contextmanager
def limited(seconds: int) -> Iterator[None]:
    """Stop what runs longer, where the system can."""

    def stop(*_: object) -> None:
        raise TooLong(f"took longer than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def main() -> int:
    """Run what the command line asks for."""
    parser = Arguments(__doc__, idioms=["mlp"], points=["capture", "invert", "labels best"])
    parser.several("--idioms", IDIOMS, "of tests/support/idioms.py")
    parser.several("--points", POINTS, "entry points")
    options = parser.parse_args()
    counts: dict[str, Counter[str]] = {point: Counter() for point in options.points}
    failed = 0
    for name in options.idioms:
        idiom = IDIOMS[name]
        for size in (2, 1):
            model = idiom.network()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                truth, update = sent(idiom, model, size)
            for point in options.points:
                if size == 1 and point not in SINGLE:
                    continue
                began = time.process_time()
                outcome = verdict(partial(POINTS[point], idiom, model, update), truth)
                seconds = time.process_time() - began
                fine = outcome in ("answer", "sentence")
                counts[point][outcome if fine else "failed"] += 1
                failed += not fine
                if not fine or seconds > 5:
                    print(f"{name} · B = {size} · {point}: {outcome} ({seconds:.1f} s)", flush=True)
    print("\n| entry point | answers | sentences | failed |\n|---|---|---|---|")
    for point, count in counts.items():
        print(f"| {point} | {count['answer']} | {count['sentence']} | {count['failed']} |")
    calls = sum(count.total() for count in counts.values())
    print(f"\n{len(options.idioms)} idioms, {calls} calls, {failed} failed")
    return int(failed > 0)


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())
