"""Draws the plots of docs/capacity.md from the capacity plan, and of docs/performance.md from jobs.json, which
``make -s bench-jobs ARGS="--json …"`` has printed. ``make plots`` runs it.
"""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib as mpl
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from sqla_byok.plan import plan

IMAGES = Path(__file__).parents[1] / "docs" / "images"
DEADLINES = {10.0: "10 s", 60.0: "1 min", 300.0: "5 min (default)", 3600.0: "1 h"}
PROCESSES = 20
AWS, STS = 10_000, 600


def draw_calls(axes: Axes) -> None:
    """All tenants' calls, beside the quotas that they share: AWS without a role, and STS with roles."""
    tenants = [10, 100, 1_000, 10_000, 100_000]
    for deadline, label in DEADLINES.items():
        axes.plot(tenants, [plan(each, PROCESSES, deadline).kms_calls for each in tenants], label=label)
    for quota, label in ((AWS, "AWS KMS, an account"), (STS, "AWS STS, an account (roles)")):
        axes.axhline(quota, color="black", linewidth=0.8, linestyle="--")
        axes.annotate(label, (11, quota * 1.15), fontsize=8)
    axes.set(
        xscale="log", yscale="log", xlim=(10, 100_000), ylim=(0.01, 300_000),
        xlabel=f"tenants in use, in each of {PROCESSES} processes", ylabel="KMS calls per second",
        title="All tenants together",
    )  # fmt: skip
    share = axes.secondary_yaxis(
        "right", functions=(lambda calls: calls / AWS * 100, lambda part: part * AWS / 100)
    )
    share.set_ylabel("% of 10,000 calls per second")
    axes.legend(title="revoke_within", loc="lower right", fontsize=8)


def draw_vault(axes: Axes) -> None:
    """One tenant's calls, beside its own vault's quota, with the largest and the smallest there is."""
    processes = [1, 10, 100, 1_000]
    for (deadline, label), colour in zip(DEADLINES.items(), ("C0", "C1", "C2", "C3"), strict=True):
        for bits, hsm, style in ((2048, False, "-"), (4096, True, ":")):
            shares = [
                plan(1, each, deadline, provider="azure", key_bits=bits, hsm=hsm).quotas[0].share * 100
                for each in processes
            ]
            axes.plot(processes, shares, style, color=colour, label=label if style == "-" else None)
    axes.axhline(100, color="black", linewidth=0.8, linestyle="--")
    axes.annotate("the vault's quota", (1.1, 130), fontsize=8)
    axes.set(
        xscale="log", yscale="log", xlim=(1, 1_000), ylim=(1e-6, 3_000),
        xlabel="processes", ylabel="% of the vault's quota", title="One tenant's Azure vault",
    )  # fmt: skip
    axes.legend(
        title="revoke_within\n(— RSA-2048, ··· RSA-4096 in an HSM)",
        title_fontsize=8,
        loc="lower right",
        fontsize=8,
    )


def draw_jobs(axes: Axes) -> None:
    """How long each job takes, beside the bare UPDATE of the same bytes."""
    figures = json.loads((Path(__file__).parent / "jobs.json").read_text())["figures"]
    times: dict[str, list[tuple[int, float]]] = {}
    for figure in (figure for figure in figures if figure["encrypted"]):
        job, rows, workers = figure["what"].split(", ")
        number = int(rows.split()[0].replace(",", ""))
        times.setdefault(f"{job}, {workers}", []).append((number, number / _rate(figure["encrypted"])))
        if figure["plain"] and workers == "1 worker":
            times.setdefault(f"bare UPDATE for {job}", []).append((number, number / _rate(figure["plain"])))
    for label, points in sorted(times.items()):
        style = "--" if label.startswith("bare") else "-"
        axes.plot(*zip(*sorted(points), strict=True), style, marker="o", markersize=3, label=label)
    axes.axvline(300_000, color="black", linewidth=0.8, linestyle=":")
    axes.set(
        xscale="log", yscale="log", xlabel="rows", ylabel="seconds", title="Jobs on PostgreSQL, two cores"
    )
    axes.legend(fontsize=8)


def _rate(shown: str) -> float:
    return float(shown.split()[0].replace(",", ""))


def main() -> None:
    # with the salt, and without a date, the same figures give the same bytes
    mpl.rcParams.update({"svg.hashsalt": "sqla-byok", "font.size": 9, "axes.grid": True, "grid.alpha": 0.3})
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
    draw_calls(left)
    draw_vault(right)
    IMAGES.mkdir(exist_ok=True)
    figure.savefig(IMAGES / "capacity.svg", metadata={"Date": None})
    figure, axes = plt.subplots(figsize=(6.5, 4.2), layout="constrained")
    draw_jobs(axes)
    figure.savefig(IMAGES / "jobs.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
