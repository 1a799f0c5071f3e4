"""What a run is doing, and where its time went: `python cluster/status.py runs/NAME`."""

import argparse
import contextlib
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path

from cluster.goodput import Status, duration, read_status, summary
from cluster.report import html_page
from launcher.goodput import PARTS
from launcher.lines import read_metrics


def describe(status: Status) -> list[str]:
    """The lines to print."""
    lines = [
        f"{status.run}: {status.state}" + (f", SLURM job {status.job}" if status.job else ""),
        "  " + summary(status),
    ]
    if status.goodput is not None:
        lines.append(f"  goodput {status.goodput:.1%} of {duration(status.wall_s)}:")
        lines += [f"    {status.parts_s[key] / status.wall_s:6.1%}  {duration(status.parts_s[key]):>9}  {PARTS[key]}"
                  for key in PARTS]  # fmt: skip
    lines += [f"  slow {text}" for text in status.slow]
    if status.starts:
        lines.append(f"  {len(status.starts)} starts:")
    for start in status.starts:
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(start.time))
        job = f"  job {start.job}, restart {start.restart}, on {start.nodes}" if start.job else ""
        lines.append(f"    {when}{job}, from step {start.from_step:,}: {start.end or 'running'}")
    return lines


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="cluster/status.py",
        description="What a run is doing, and where its time went.",
        epilog="example: python cluster/status.py runs/gpt3-1.3b --watch",
    )
    parser.add_argument("run", type=Path, help="a run's folder")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of lines for people")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page with plots there, too")
    parser.add_argument("--watch", type=float, nargs="?", const=10.0, metavar="SECONDS", help="again every so many "
                        "seconds, 10 without a number, until the run is finished")  # fmt: skip
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    args = parse_arguments(argv)
    if not (args.run / "ledger.jsonl").is_file():
        print(f"status: {args.run} holds no ledger.jsonl; expected a run's folder, such as runs/NAME", file=sys.stderr)
        return 2
    with contextlib.suppress(KeyboardInterrupt):
        while True:
            status = read_status(args.run, time.time())
            if args.html:
                page = html_page(status, read_metrics(args.run / "metrics.jsonl"), time.time())
                try:
                    args.html.write_text(page, encoding="utf-8")
                except OSError as error:
                    print(f"status: {args.html} cannot be written: {error.strerror}; choose another", file=sys.stderr)
                    return 2
            text = json.dumps(asdict(status)) if args.json else "\n".join(describe(status))
            print("\033[H\033[2J" + text if args.watch and sys.stdout.isatty() else text, flush=True)
            if not args.watch or status.state == "finished":
                break
            time.sleep(args.watch)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
