"""`offload-moe verify`: compares a store with its checksums, repairs it, and upgrades it."""

import argparse
import sys
from typing import TYPE_CHECKING

from offload_moe.errors import ConfigError
from offload_moe.system.names import check_installed
from offload_moe.system.sizes import format_size

from ..options import Subparsers, add_link_flag
from ..progress import Reporter, reporter
from ..terminal import safe

if TYPE_CHECKING:
    from pathlib import Path

    from offload_moe.convert.repair import Damage
    from offload_moe.store import Store

EXIT_WHOLE, EXIT_DAMAGED = 0, 1


def add_parser(subparsers: Subparsers) -> None:
    parser = subparsers.add_parser(
        "verify",
        help="check a store, repair it, upgrade it",
        description="Read a whole store and compare it with its checksums. Exits with 0 if everything matches and "
        "with 1 if anything differs. With --repair, damaged pieces are made again from the checkpoint. With --upgrade, "
        "a store of an older version is first rewritten in the order in which it is computed with.",
    )
    parser.add_argument("store", metavar="STORE", help="store, by path or by its name in `offload-moe list`")
    changes = parser.add_mutually_exclusive_group()
    changes.add_argument("--repair", action="store_true", help="make damaged pieces again from the source")
    changes.add_argument(
        "--upgrade",
        action="store_true",
        help="rewrite an older store file by file; needs disk space for one more file, and can be stopped and repeated",
    )
    parser.add_argument(
        "--source",
        metavar="SOURCE",
        help="folder, GGUF file, name in the cache, or hub id of the checkpoint (default: the store's own source)",
    )
    add_link_flag(parser)


def run(options: argparse.Namespace) -> int:
    if options.source and not options.repair:
        raise ConfigError("--source names the checkpoint of a repair. Add --repair.")
    check_installed(options.store)
    with reporter() as report:
        report("Loading libraries")
        from offload_moe.convert.repair import find_damage, restore_sizes
        from offload_moe.store import Store
        from offload_moe.store.installed import check_finished, resolve_installed
        from offload_moe.store.journal import check_not_written

        path = resolve_installed(options.store)
        check_finished(path)
        if options.repair:
            check_not_written(path)
            restore_sizes(path)
        if options.upgrade:
            _upgrade(path, report)
        store = Store.open(path)
        damages = find_damage(store, report)
        source = _source(store, options.source)
        remaining = damages
        if options.repair and damages:
            remaining = _repair(store, damages, source, report, follow_links=bool(options.follow_links))
    for damage in damages:
        verb = "" if not options.repair else "repaired: " if damage not in remaining else "not repaired: "
        print(safe(f"{verb}{damage.piece.path.name}: {damage.piece.name}"))
    line = _verdict(store, damages, remaining, source, is_repair=options.repair)
    print(line, file=sys.stderr if damages else sys.stdout)
    return EXIT_DAMAGED if remaining else EXIT_WHOLE


def _upgrade(path: "Path", report: Reporter) -> None:
    from offload_moe.store.upgrade import upgrade

    num_files = upgrade(path, report, report.notice)
    report.notice(f"Upgraded {num_files} files of {path}." if num_files else f"{path} has nothing to upgrade.")


def _source(store: "Store", named: str | None) -> "Path | str | None":
    """The source of a repair: the given one, else the store's own source if that is in the cache, as the demo is."""
    from offload_moe.system.names import resolve_whole

    folder = resolve_whole(named or store.source)
    return folder if folder.is_dir() else named


def _repair(
    store: "Store", damages: "list[Damage]", source: "Path | str | None", report: Reporter, *, follow_links: bool
) -> "list[Damage]":
    from offload_moe.convert.repair import repair

    return repair(
        store,
        damages,
        source,
        follow_links=follow_links,
        progress=report,
    )


def _verdict(
    store: "Store", damages: "list[Damage]", remaining: "list[Damage]", source: "Path | str | None", *, is_repair: bool
) -> str:
    from offload_moe.convert.repair import has_known_source

    pieces = list(store.pieces())
    if not pieces:
        return (
            f"{store.path} stands for GGUF files, which have no checksums: all are there, with the sizes that they "
            "had. `offload-moe quantize` writes a store of the same bits with checksums."
        )
    if not damages:
        size = format_size(sum(piece.place.num_bytes for piece in pieces))
        return f"{store.path} is intact: {len(pieces):,} checksums match, {size}."
    if not remaining:
        return f"{store.path} is repaired."
    if is_repair:
        return (
            f"{len(remaining)} of {len(damages)} damaged pieces could not be made again with the checksum on record: "
            "the source is another checkpoint than the store's own, or this version encodes it differently. Quantize "
            "the model again."
        )
    is_known = source is not None or has_known_source(store)
    flags = "--repair" if is_known else f"--repair --source SOURCE (the checkpoint, which was named {store.source})"
    return f"{store.path} is damaged: {len(damages)} of {len(pieces):,} pieces. Check the disk, and add {flags}."
