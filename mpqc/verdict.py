"""What a comparison of builds means, in plain words: where mixed precision pays, and where not."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from mpqc.budget import show

Role = Literal["uniform", "plan", "opponent"]
COSTS = ("size", "bitops", "latency")
SAME_LATENCY = 0.03  # relative; two runs of one build differ by as much


@dataclass(frozen=True)
class Build:
    """One row of a comparison.

    Attributes:
        name: "w4a4", the stem of a plan's file, "ort-fp32".
        role: what it is.
        accuracy: share of labels met; None without labels.
        agreement: share of samples with the float model's class; None without classes.
        sqnr_db: signal to quantization noise of the first output against the float model.
        samples: behind these three.
        size: of the weights [bytes]; None for an opponent.
        bitops: of one run; None for an opponent.
        latency: fastest run [s].
        latency_median: of the same runs.
        verified: whether the artifact computes what its reference says; None for an opponent.
        library_bytes: of model.so.
        kernels: kind -> layers that run with it.
        widths: layer -> precision, as text.
        folder: of the artifact inside the report's.
    """

    name: str
    role: Role
    accuracy: float | None = None
    agreement: float | None = None
    sqnr_db: float | None = None
    samples: int = 0
    size: float | None = None
    bitops: float | None = None
    latency: float | None = None
    latency_median: float | None = None
    verified: bool | None = None
    library_bytes: int | None = None
    kernels: Mapping[str, int] | None = None
    widths: Mapping[str, str] | None = None
    folder: str | None = None

    def metric(self, name: str) -> float | None:
        value = getattr(self, name)
        return None if value is None else float(value)


def quality_of(builds: Sequence[Build]) -> str:
    """The best measure that all of our builds have: accuracy, agreement or sqnr_db."""
    own = [build for build in builds if build.role != "opponent"]
    for name in ("accuracy", "agreement"):
        if own and all(build.metric(name) is not None for build in own):
            return name
    return "sqnr_db"


def pareto(builds: Sequence[Build], cost: str) -> tuple[str, ...]:
    """Names of our builds that no other of ours beats in quality and one cost."""
    quality = quality_of(builds)
    own = [
        (build.name, build.metric(quality), build.metric(cost))
        for build in builds if build.role != "opponent"
    ]  # fmt: skip
    known = [(n, q, c) for n, q, c in own if q is not None and c is not None]
    return tuple(
        name for name, q, c in known
        if not any(q2 >= q and c2 <= c and (q2 > q or c2 < c) for _, q2, c2 in known)
    )  # fmt: skip


def verdict(builds: Sequence[Build]) -> list[str]:
    """Sentences: each plan against each uniform build, then against the opponents."""
    plans = [build for build in builds if build.role == "plan"]
    uniforms = [build for build in builds if build.role == "uniform"]
    opponents = [build for build in builds if build.role == "opponent"]
    quality = quality_of(builds)
    lines = []
    wins = 0
    for plan in plans:
        for uniform in uniforms:
            line, won = _against(plan, uniform, quality)
            lines.append(line)
            wins += won
    if plans and uniforms and not wins:
        lines.append(
            "No mixed plan here dominates a uniform build: take the uniform build unless one of "
            "the trades above is worth it."
        )
    lines += _fronts(builds, quality)
    lines += [line for opponent in opponents if (line := _speed(builds, opponent))]
    failed = [build.name for build in builds if build.verified is False]
    if failed:
        lines.insert(0, f"WRONG RESULTS: {', '.join(failed)} does not compute what its reference "
                     "says; its numbers mean nothing.")  # fmt: skip
    return lines


def _against(plan: Build, uniform: Build, quality: str) -> tuple[str, bool]:
    """One sentence, and whether the plan dominates."""
    gain, noisy = _quality_gain(plan, uniform, quality)
    parts = {cost: _ratio(plan, uniform, cost) for cost in COSTS}
    known = {cost: ratio for cost, ratio in parts.items() if ratio is not None}
    cheaper = [c for c, r in known.items() if r < (1 - SAME_LATENCY if c == "latency" else 1)]
    dearer = [c for c, r in known.items() if r > (1 + SAME_LATENCY if c == "latency" else 1)]
    told = [_quality_text(gain, noisy, quality)] if gain is not None else []
    told += [_ratio_text(cost, ratio) for cost, ratio in known.items()]
    facts = ", ".join(told)
    up, down = gain is not None and gain > 0, gain is not None and gain < 0
    if gain is None:
        return f"{plan.name} and {uniform.name} cannot be ranked: no {quality} ({facts}).", False
    if not down and not dearer and (up or cheaper):
        return f"{plan.name} dominates {uniform.name}: {facts}.", True
    if not up and not cheaper and (down or dearer):
        return f"{plan.name} LOSES to {uniform.name}, which dominates it: {facts}.", False
    if not (up or down or cheaper or dearer):
        return f"{plan.name} and {uniform.name} are equal: {facts}.", False
    good = [*([quality] if up else []), *cheaper]
    bad = [*([quality] if down else []), *dearer]
    return (
        f"{plan.name} trades with {uniform.name}: better {_and(good)}, worse {_and(bad)} "
        f"({facts}).",
        False,
    )


def _quality_gain(plan: Build, uniform: Build, quality: str) -> tuple[float | None, bool]:
    """Gain, and whether it is within the noise of the samples."""
    ours, theirs = plan.metric(quality), uniform.metric(quality)
    if ours is None or theirs is None:
        return None, False
    if quality == "sqnr_db" or not plan.samples:
        return ours - theirs, False
    spread = (ours * (1 - ours) + theirs * (1 - theirs)) / plan.samples
    return ours - theirs, 0 < abs(ours - theirs) <= 1.96 * math.sqrt(spread)


def _quality_text(gain: float, noisy: bool, quality: str) -> str:
    if quality == "sqnr_db":
        return f"{gain:+.1f} dB" if gain else "the same noise"
    doubt = ", within the noise of the samples" if noisy else ""
    return f"{gain * 100:+.2f} points of {quality}{doubt}" if gain else f"the same {quality}"


def _ratio(plan: Build, uniform: Build, cost: str) -> float | None:
    ours, theirs = plan.metric(cost), uniform.metric(cost)
    return ours / theirs if ours is not None and theirs else None


def _ratio_text(cost: str, ratio: float) -> str:
    name = {"size": "size", "bitops": "BitOPs", "latency": "latency"}[cost]
    return f"the same {name}" if round(ratio, 3) == 1 else f"{ratio - 1:+.1%} {name}"


def _fronts(builds: Sequence[Build], quality: str) -> list[str]:
    lines = []
    for cost in COSTS:
        if names := pareto(builds, cost):
            what = "BitOPs" if cost == "bitops" else cost
            lines.append(f"On the front of {quality} against {what}: {', '.join(names)}.")
    return lines


def _speed(builds: Sequence[Build], opponent: Build) -> str:
    """Our fastest and slowest build beside an opponent."""
    own = [(b.latency, b.name) for b in builds if b.role != "opponent" and b.latency is not None]
    theirs = opponent.latency
    if not own or theirs is None:
        return ""
    slower = [name for latency, name in own if latency > theirs * (1 + SAME_LATENCY)]
    if len(slower) == len(own):
        best = min(own)
        return f"All builds are slower than {opponent.name} ({show('latency', theirs)}); " + (
            f"the fastest, {best[1]}, takes {best[0] / theirs:.2f} times as long."
        )
    latency, name = min(own)
    text = f"{name} is {theirs / latency:.2f} times as fast as {opponent.name}"
    return f"{text}; slower than it: {', '.join(slower)}." if slower else f"{text}; none is slower."


def _and(words: Sequence[str]) -> str:
    return ", ".join("BitOPs" if word == "bitops" else word for word in words)
