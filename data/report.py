"""What a finished corpus holds, source by source: a table to read, and the same as numbers for report.json."""

from typing import Any

from data.manifest import Manifest, SourceEntry, SplitEntry

HEAD = ("source", "split", "documents", "bytes", "tokens", "bytes/token")


def report(manifest: Manifest) -> str:
    """Documents, bytes, tokens and bytes a token of every source and split; below it what was left out and why."""
    rows: list[tuple[str, ...]] = [HEAD]
    for name, source in manifest.sources.items():
        rows += [(name, split, *_cells(entry)) for split, entry in source.splits.items()]
    for split in ("train", "valid") if len(manifest.sources) > 1 else ():
        if parts := manifest.splits(split):
            rows.append(("all", split, *_cells(_joined(parts))))
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEAD))]
    lines = [
        "  ".join(cell.ljust(width) if column < 2 else cell.rjust(width)
                  for column, (cell, width) in enumerate(zip(row, widths, strict=True)))
        for row in rows
    ]  # fmt: skip
    return "\n".join([*lines, *(_left_out(name, source, widths[0]) for name, source in manifest.sources.items())])


def numbers(manifest: Manifest) -> dict[str, Any]:
    """The same as plain values."""
    return {
        "tokenizer": manifest.tokenizer.model_dump(),
        "sources": {
            name: {
                "kind": source.kind,
                "splits": {split: _counts(entry) for split, entry in source.splits.items()},
                "unknown_tokens": source.unknown_tokens,
                "left_out": source.left_out,
            }
            for name, source in manifest.sources.items()
        },
    }


def _joined(parts: dict[str, SplitEntry]) -> SplitEntry:
    return SplitEntry(shards=tuple(shard for part in parts.values() for shard in part.shards))


def _counts(entry: SplitEntry) -> dict[str, Any]:
    """bytes and bytes_per_token are None where the text is not known."""
    known = entry.bytes if all(shard.bytes or not shard.tokens for shard in entry.shards) else None
    return {
        "documents": entry.documents,
        "bytes": known,
        "tokens": entry.tokens,
        "bytes_per_token": None if known is None else round(known / max(entry.tokens, 1), 4),
        "shards": len(entry.shards),
    }


def _cells(entry: SplitEntry) -> tuple[str, ...]:
    counts = _counts(entry)
    known = counts["bytes"] is not None
    return (
        f"{counts['documents']:,}",
        f"{counts['bytes']:,}" if known else "-",
        f"{counts['tokens']:,}",
        f"{counts['bytes_per_token']:.3f}" if known else "-",
    )


def _left_out(name: str, source: SourceEntry, width: int) -> str:
    what = ", ".join(f"{count:,} {reason}" for reason, count in sorted(source.left_out.items()))
    beyond = f"{source.unknown_tokens:,} tokens for what the vocabulary lacks"  # single bytes, with a byte fallback
    return f"{name.ljust(width)}  left out: {what or 'none'}; {beyond}"
