"""Every network of `penjing.testing` through capture, channel groups, pruning, two runtimes; writes docs/coverage.md.

    python benchmarks/coverage.py [--only NAME …] [--threads 1] [--ratio 0.5] [--json FILE] [--out FILE.md] [--fresh]

What was measured is kept line by line in --work (default out/coverage.jsonl), so that a run that was stopped goes on
where it was; --fresh begins anew. Networks run in a process of their own, which is replaced when it crashes or takes
longer than --timeout seconds for one. Without all networks of the zoo in --work no page is written.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import select
import subprocess
import sys
import textwrap
from collections import Counter
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from penjing.runtimes.parity import FLOAT_TOLERANCE
from penjing.testing.networks import ZOO
from penjing.testing.oracles import TOLERANCE

ROOT = Path(__file__).resolve().parents[1]
RUNTIMES = {"onnxruntime": "ONNX Runtime", "openvino": "OpenVINO"}
#: A worker is replaced after so many networks: what libraries keep would add up.
NETWORKS_A_WORKER = 25
Row = dict[str, Any]


# -------------------------------------------------------------------------------------------------------------- workers
def serve(chosen: argparse.Namespace) -> None:
    """Reads names, writes rows: what the parent talks to. Everything else that is printed goes to standard error."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    import torch
    from coverage_stages import Examination

    torch.set_num_threads(chosen.threads)
    for line in sys.stdin:
        print(json.dumps(Examination(line.strip(), chosen.ratio).run()), file=answers, flush=True)


class Worker:
    """A process that examines networks, started when needed."""

    def __init__(self, chosen: argparse.Namespace) -> None:
        self.chosen, self.done = chosen, 0
        self.process: subprocess.Popen[str] | None = None

    def examine(self, name: str, kind: str) -> Row:
        if self.process is None:
            command = [sys.executable, __file__, "--serve", "--threads", str(self.chosen.threads)]
            self.process = subprocess.Popen(
                [*command, "--ratio", str(self.chosen.ratio)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
            )  # fmt: skip
            self.done = 0
        process = self.process
        process.stdin.write(name + "\n")
        process.stdin.flush()
        ready, _, _ = select.select([process.stdout], [], [], self.chosen.timeout)
        answer = process.stdout.readline() if ready else ""
        self.done += 1
        if answer and self.done < NETWORKS_A_WORKER:
            return json.loads(answer)
        process.kill()
        process.wait()
        self.process = None
        if answer:
            return json.loads(answer)
        reason = f"more than {self.chosen.timeout:g} s" if not ready else f"the process ended ({process.returncode})"
        return {"name": name, "kind": kind, "seconds": {}, "failures": {"process": {"reason": reason, "place": ""}}}


# ------------------------------------------------------------------------------------------------------------- the page
def page(rows: Sequence[Row], chosen: argparse.Namespace) -> str:
    said = facts(rows)
    made = ", ".join(f"{name} {number}" for name, number in said["versions"].items())
    text = [
        "# Coverage",
        "",
        f"Written by `python benchmarks/coverage.py` with {made}.",
        "",
        f"- **{said['captured']} of {said['networks']}** networks of `penjing.testing` captured.",
        f"- **{said['prunable']}** of them prunable: `PruneChannels(ratio={chosen.ratio:g})`, without data, makes them "
        "smaller and their outputs keep their shapes.",
        f"- **{said['masked']} of {said['maskable']}** compute without the removed channels what their twins with "
        "these channels at zero compute. This is for groups where removing is masking.",
        f"- **{said['crossed']} of {said['crossable']}** in which a statistic (of a layer norm, say) crosses channels "
        "compute without all the removed channels what their twins compute with these at zero and the statistic taken "
        f"of the others. Both together look at all of the {said['groups']} groups.",
        *(
            f"- **{said[r]} of {said['prunable']}** pruned networks run on {label} and give what they give in PyTorch."
            for r, label in RUNTIMES.items()
        ),
        "",
        "Networks are small and have random weights: this says what can be done with an architecture, not how good "
        "what comes out is.",
        "",
        "*groups*: channel groups of two units or more. *prunable*: share of parameter entries that belong to at least "
        "one unit that can be removed; the others belong to inputs and outputs of the network, or meet an operator "
        "without a rule. *left*: parameters after pruning. *masked*, *statistics*: the two checks, "
        "largest difference in double precision relative to the "
        f"largest output; up to {TOLERANCE:.0e} counts as none (–: no such groups; †: without copies of channels "
        "against with them instead of a twin). *ONNX Runtime*, *OpenVINO*: the same of the exported file in single "
        f"precision, on batches of two sizes; up to {FLOAT_TOLERANCE:.0e}.",
        "",
        "| network | kind | parameters | groups | prunable | left | masked | statistics | ONNX Runtime | OpenVINO |",
        "|---|---|---|---|---|---|---|---|---|---|",
        *map(line, sorted(rows, key=lambda r: r["kind"])),
        "",
        "## Failures",
        "",
        *(failures(rows) or ["None."]),
        "",
    ]
    return "\n".join(map(wrapped, text))


def wrapped(paragraph: str) -> str:
    """Prose in lines of the length that the other pages have."""
    if paragraph.startswith("|"):
        return paragraph
    indent = "  " if paragraph.startswith("- ") else ""
    return textwrap.fill(paragraph, 130, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def facts(rows: Sequence[Row]) -> dict[str, Any]:
    def count(stage: str, of: Sequence[Row]) -> int:
        return sum(stage not in r["failures"] for r in of)

    captured = [r for r in rows if "parameters" in r]
    pruned = [r for r in captured if "after" in r and "prune" not in r["failures"]]
    maskable = [r for r in pruned if "masked" in r or "masked" in r["failures"]]
    crossable = [r for r in pruned if "crossed" in r or "crossed" in r["failures"]]
    packages = ("penjing", "torch", "transformers", *RUNTIMES)
    return {
        "networks": len(rows), "captured": len(captured), "prunable": len(pruned),
        "maskable": len(maskable), "masked": count("masked", maskable),
        "crossable": len(crossable), "crossed": count("crossed", crossable),
        "groups": sum(r["groups"] for r in pruned),
        **{r: count(r, pruned) for r in RUNTIMES},
        "kinds": dict(Counter(r["kind"] for r in rows)),
        "versions": {p: version(p) for p in packages}, "python": platform.python_version(),
    }  # fmt: skip


def line(row: Row) -> str:
    failed = row["failures"]

    def cell(key: str, form: str, value: Any) -> str:
        if key in failed:
            return "**fails**"
        return "–" if value is None else "0" if value == 0 and form == ".0e" else format(value, form)

    made = "build" if "build" in failed else "capture"
    cells = [row["name"], row["kind"], cell(made, ",", row.get("parameters"))]
    cells += [cell("groups", "d", row.get("groups")), cell("groups", ".1%", row.get("prunable"))]
    cells += [cell("prune", ".1%", row.get("after")), cell("masked", ".0e", row.get("masked"))]
    cells += [cell("crossed", ".0e", row.get("crossed")) + "†" * ("copied" in row and "crossed" not in failed)]
    cells += [cell(r, ".0e", row.get(r, {}).get("max_rel")) for r in RUNTIMES]
    return "| " + " | ".join(cells) + " |"


def failures(rows: Sequence[Row]) -> list[str]:
    lines = []
    for row in rows:
        for stage, failure in row["failures"].items():
            text = f"- `{row['name']}`, {RUNTIMES.get(stage, stage)}: {failure['reason']}"
            whole = row.get(stage, {}).get("unpruned") if stage in RUNTIMES else None
            if whole:
                text += " (unpruned, it runs)" if whole == "runs" else " (unpruned, it fails too)"
            lines.append(text)
    return lines


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(".part")
    aside.write_text(text, encoding="utf8")
    aside.replace(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these networks (again, if they were done)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--ratio", type=float, default=0.5, help="what PruneChannels takes of every group")
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds for one network")
    parser.add_argument("--json", type=Path, help="all rows and counts")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "coverage.md")
    parser.add_argument("--work", type=Path, default=ROOT / "out" / "coverage.jsonl")
    parser.add_argument("--fresh", action="store_true", help="forget what --work holds")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.serve:
        return serve(chosen)
    chosen.work.parent.mkdir(parents=True, exist_ok=True)
    if chosen.fresh:
        chosen.work.unlink(missing_ok=True)
    kept = chosen.work.read_text().splitlines() if chosen.work.exists() else []
    done: dict[str, Row] = {r["name"]: r for r in map(json.loads, kept)}
    worker = Worker(chosen)
    for name in chosen.only or [n for n in ZOO if n not in done]:
        row = done[name] = worker.examine(name, ZOO[name].kind)
        with chosen.work.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(line(row), round(sum(row["seconds"].values())), "s", *failures([row]), file=sys.stderr, flush=True)
    rows = [done[n] for n in ZOO if n in done]
    if chosen.json:
        write(chosen.json, json.dumps({**facts(rows), "ratio": chosen.ratio, "rows": rows}, indent=1) + "\n")
    if len(rows) == len(ZOO):
        write(chosen.out, page(rows, chosen))
    print(json.dumps({k: v for k, v in facts(rows).items() if isinstance(v, int)}))


if __name__ == "__main__":
    main()
