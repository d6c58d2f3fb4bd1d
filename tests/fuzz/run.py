"""The fuzzer: random geometries through every kernel of the registry and through the API, in child processes.

    python tests/fuzz/run.py --cases 20000 --isa all

A crash or a hang is a finding like a wrong number, and the run goes on behind it. Every finding is printed with what
draws it again. The exit code is 1 where there is any.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import queue
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve().parent
PLANTS = ("wrong", "crash", "hang", "overread", "overwrite", "stale")
ISAS = ("scalar", "avx2", "avx512", "avx512_bf16", "amx")


@dataclass
class Tally:
    """What one sequence of cases gave."""

    cases: int = 0
    counts: collections.Counter[str] = field(default_factory=collections.Counter)  # runs by kernel
    findings: list[dict] = field(default_factory=list)

    @property
    def runs(self) -> int:
        return self.counts.total()


def run(
    seed: int,
    cases: int,
    *,
    mode: str = "convolution",
    isa: str | None = None,
    only: str | None = None,
    plant: str | None = None,
    first: int = 0,
    strict: bool = False,
    patience: float = 120.0,
    most: int = 50,
    unlisted: bool = False,
    precision: str | None = None,
    until: float | None = None,
) -> Tally:
    """Runs `cases` cases in child processes, a new one behind each that ended early.

    Args:
        patience: seconds without a word from the child, after which it hangs.
        most: findings after which the rest is left.
        unlisted: oneDNN runs beyond the geometries that it is known to be right for, too.
        precision: of torch.set_float32_matmul_precision.
        until: time.time() after which the rest is left.
    """
    tally = Tally()
    # No empty entry, which would be the current folder: a checkout has the package without its compiled library.
    paths = [str(HERE.parent), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    # glibc fills new memory with bytes that make huge numbers: who reads what nobody wrote shows it every time
    environment |= {"OMP_NUM_THREADS": "1", "R3D_KERNELS_TUNE": "0", "MALLOC_PERTURB_": "1"}
    if isa is not None:
        environment["R3D_KERNELS_ISA"] = isa
    if strict:
        environment["R3D_KERNELS_FP32"] = "strict"
    skip: list[str] = []
    end = first + cases
    with tempfile.TemporaryDirectory() as folder:
        environment["R3D_KERNELS_CACHE"] = folder
        progress = Path(folder, "progress")
        while first < end and len(tally.findings) < most:
            progress.write_text("")
            command = [
                sys.executable,
                str(HERE / "worker.py"),
                f"--seed={seed}",
                f"--first={first}",
                f"--mode={mode}",
            ]
            command += [f"--cases={end - first}", f"--progress={progress}", *(f"--skip={s}" for s in skip)]
            command += [f"--only={only}"] if only else []
            command += [f"--plant={plant}"] if plant else []
            command += ["--unlisted"] if unlisted else []
            command += [f"--precision={precision}"] if precision else []
            command += [f"--until={until}"] if until else []
            child = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
            )
            lines: queue.Queue[str | None] = queue.Queue()
            errors: list[str] = []
            threading.Thread(target=_read, args=(child.stdout, lines), daemon=True).start()
            listener = threading.Thread(
                target=lambda c=child, e=errors: e.append(c.stderr.read()), daemon=True
            )
            listener.start()
            begin, counts, hung, done = first, {}, False, False
            while True:
                try:
                    line = lines.get(timeout=patience)
                except queue.Empty:
                    hung = True
                    child.kill()
                    break
                if line is None:
                    break
                told = json.loads(line)
                if "finding" in told:
                    if told not in tally.findings:  # told before the child ended early in the same case
                        tally.findings.append(told)
                    if len(tally.findings) >= most:
                        child.kill()
                        break
                else:
                    first, counts, done = told["at"], told["runs"], told.get("done", False)
            code = child.wait()
            listener.join(5)
            tally.counts.update(counts)
            text = progress.read_text().strip()
            if code != 0 and text:  # all cases before the one that ended it are done
                first = _number(json.loads(text)["case"])[1]
            tally.cases += first - begin
            if done and code == 0:
                break
            if len(tally.findings) >= most:
                continue
            if not text:
                raise RuntimeError("".join(errors) or f"the worker ended with {code} before its first case")
            last = json.loads(text)
            what = "hangs" if hung else f"ended the process: {_reason(code, ''.join(errors))}"
            kind = "hang" if hung else "crash" if code < 0 else "error"
            tally.findings.append({"finding": kind, "what": what} | last)
            skip.append(last["key"])
    return tally


def _here() -> tuple[str, ...]:
    """The instruction sets that this processor has."""
    ask = "from r3d_kernels.backends import describe; print(describe()['best_isa'])"
    # Not in a checkout, whose package would come before the installed one.
    told = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, check=True, cwd=HERE)
    best = told.stdout.strip()
    return ISAS[: ISAS.index(best) + 1]


def _read(stream, lines: queue.Queue[str | None]) -> None:
    for line in stream:
        lines.put(line)
    lines.put(None)


def again(finding: dict, mode: str, strict: bool = False, precision: str | None = None) -> str:
    """The command that draws a finding's case again and runs it alone."""
    seed, index = _number(finding["case"])
    words = ["python tests/fuzz/run.py", f"--seed {seed} --first {index} --cases 1 --isa {finding['isa']}"]
    words += [f"--mode {mode}"] if mode != "convolution" else []
    words += ["--strict"] if strict else []
    words += [f"--precision {precision}"] if precision else []
    words += ["--unlisted"] if finding["kernel"].endswith("anywhere") else []
    if mode == "convolution":
        words.append(f"--only {shlex.quote(finding['kernel'].split(', ')[0])}")
    return " ".join(words)


def _number(case: str) -> tuple[int, int]:
    """seed and index of a case as it is printed"""
    seed, index = re.search(r"(\d+):(\d+)", case).groups()
    return int(seed), int(index)


def _reason(code: int, errors: str) -> str:
    if code < 0:
        return signal.Signals(-code).name
    return errors.strip().splitlines()[-1] if errors.strip() else f"exit code {code}"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", type=int, default=2000, help="geometries for each instruction set")
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument(
        "--first", type=int, default=0, help="the number of the first case: draws a finding again"
    )
    parser.add_argument("--isa", default="best", help="one, several with commas, 'all', or the 'best' here")
    parser.add_argument("--mode", default="convolution", choices=("convolution", "state", "pools"))
    parser.add_argument("--only", help="kernels with this in their name")
    parser.add_argument("--plant", choices=PLANTS, help="a fault to be found")
    parser.add_argument("--unlisted", action="store_true", help="oneDNN beyond its list of geometries, too")
    parser.add_argument("--precision", choices=("high", "medium"), help="set_float32_matmul_precision")
    parser.add_argument("--seconds", type=float, help="for each instruction set; the cases beyond are left")
    parser.add_argument("--most", type=int, default=50, help="findings of a worker after which it stops")
    parser.add_argument("--strict", action="store_true", help="R3D_KERNELS_FP32=strict")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--json", help="a file for the figures and findings")
    options = parser.parse_args()
    isas = _here() if options.isa == "all" else options.isa.split(",")
    isas = [None if isa == "best" else isa for isa in isas]
    if unknown := set(isas) - {None, *_here()}:
        parser.error(f"--isa: this processor has {', '.join(_here())}, got {', '.join(sorted(unknown))}")
    total, begin, findings = Tally(), time.monotonic(), []
    share = -(-options.cases // options.workers)
    rows = []
    for isa in isas:
        start = time.monotonic()
        until = None if options.seconds is None else time.time() + options.seconds
        parts = range(options.first, options.first + options.cases, share)

        def part(first: int, isa: str | None = isa, until: float | None = until) -> Tally:
            count = min(share, options.first + options.cases - first)
            how = {
                "mode": options.mode,
                "only": options.only,
                "plant": options.plant,
                "strict": options.strict,
                "unlisted": options.unlisted,
                "most": options.most,
                "precision": options.precision,
                "until": until,
            }
            return run(options.seed, count, isa=isa, first=first, **how)

        with ThreadPoolExecutor(options.workers) as pool:
            tallies = list(pool.map(part, parts))
        cases, counts = sum(t.cases for t in tallies), sum((t.counts for t in tallies), collections.Counter())
        runs = counts.total()
        found = [f | {"isa": isa or "best"} for t in tallies for f in t.findings]
        rate = cases / (time.monotonic() - start) * 60
        print(
            f"{isa or 'best':12} {cases:8} geometries, {runs:9} runs of kernels, {len(found)} findings, "
            f"{rate:.0f} a minute"
        )
        for f in found:
            print(f"{f['finding']}: {f['isa']}: {f['kernel']}: {f['what']}\n    {f['case']}")
            print(f"    {again(f, options.mode, options.strict, options.precision)}", flush=True)
        rows.append(
            {
                "isa": isa or "best",
                "cases": cases,
                "runs": runs,
                "findings": len(found),
                "a_minute": round(rate),
                "runs_of": dict(counts),
            }
        )
        findings += found
        total.cases += cases
        total.counts += counts
    print("  ".join(f"{name}: {count}" for name, count in total.counts.most_common()))
    shared = collections.Counter(edge for f in findings for edge in f.get("edges") or ["no edge"])
    for edge, count in shared.most_common():
        print(f"{count:6} findings have: {edge}")
    print(f"seed {options.seed}: {total.cases} geometries, {total.runs} runs, {len(findings)} findings, "
          f"{time.monotonic() - begin:.0f} s")  # fmt: skip
    if options.json:
        Path(options.json).write_text(
            json.dumps({"seed": options.seed, "rows": rows, "findings": findings}, indent=1)
        )
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
