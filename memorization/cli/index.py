"""A local index of training pictures: ``python -m memorization index build FOLDER --out INDEX``

python -m memorization index build FOLDER --out INDEX                a folder of pictures; metadata.jsonl for captions
python -m memorization index build prompts/testbed.csv --out INDEX   a list with columns image and prompt
python -m memorization index build FOLDER --shard 3/8 --out SHARD3   its third eighth, on one of eight machines
python -m memorization index merge SHARD1 ... SHARD8 --out INDEX     put together, with the bytes of one build
python -m memorization index import FOLDER --model CLIP --out INDEX  embeddings of clip-retrieval: .npy and .parquet
python -m memorization index search INDEX picture.png -k 5
python -m memorization index compress INDEX                          for more than a few 100,000 pictures, by FAISS
python -m memorization index duplicates FOLDER                       near-copies and repeated captions, with a sheet
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from memorization.errors import InputError, printable
from memorization.flags import FLAGS, ArgumentParser, Arguments, add_flags, value
from memorization.index.kinds import FEATURES, IMPORTED, NETWORKED, SIZED
from memorization.settings import Count, Share


def parse(arguments: Arguments = None) -> argparse.Namespace:
    """The flags, checked."""
    parser = ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    # fmt: off
    make = commands.add_parser("build", help="make an index, or add to it")
    make.add_argument("source", type=Path, help="a folder of pictures, or a list with columns image and prompt")
    make.add_argument("--out", type=Path, required=True, metavar="INDEX")
    make.add_argument("--features", choices=FEATURES, default="pixels", help="default: %(default)s")
    make.add_argument("--model", metavar="FOLDER|HUB_ID",
        help="clip: the CLIP checkpoint; latents: the Stable Diffusion checkpoint whose autoencoder it is")
    make.add_argument("--size", type=value(Count), nargs=2, metavar=("H", "W"),
        help="of pixels, or of pictures before they are encoded to latents (default: 64 64; for Stable Diffusion's "
        "latents give 512 512)")
    make.add_argument("--shard", type=shard, metavar="I/K", help="the I-th of K parts, built by a machine of its own")
    add_flags(make, "--device", help=f"for the networks of latents, sscd and clip: {FLAGS['--device']['help']}")
    join = commands.add_parser("merge", help="put the shards of an index together")
    join.add_argument("shards", nargs="+", type=Path, metavar="SHARD")
    join.add_argument("--out", type=Path, required=True, metavar="INDEX")
    take = commands.add_parser("import", help="an index of embeddings that another program made")
    take.add_argument("source", type=Path, metavar="FOLDER", help="holds .npy files of embeddings (or img_emb/ does), "
        "and beside them or in metadata/ as many tables: .parquet, .jsonl or .csv, with image_path, url or key, and "
        "caption")
    take.add_argument("--out", type=Path, required=True, metavar="INDEX")
    take.add_argument("--features", choices=IMPORTED, default="clip", help="default: %(default)s")
    take.add_argument("--model", metavar="FOLDER|HUB_ID", help="clip: the checkpoint that made the embeddings")
    pack = commands.add_parser("compress", help="for more than a few 100,000 pictures: approximate search by FAISS")
    pack.add_argument("index", type=Path)
    pack.add_argument("--lists", type=value(Count), help="of the inverted file (default: 4 sqrt of the pictures)")
    pack.add_argument("--code", type=value(Count), default=64, help="bytes a picture (default: %(default)s)")
    pack.add_argument("--on-disk", action="store_true",
        help="leave the lists on disk, and fill them block by block: for what memory cannot hold")
    find = commands.add_parser("search", help="the training pictures nearest to pictures of yours")
    find.add_argument("index", type=Path)
    find.add_argument("pictures", nargs="+", type=Path)
    find.add_argument("-k", type=value(Count), default=5, help="how many (default: %(default)s)")
    twice = commands.add_parser("duplicates", help="near-copies and repeated captions in a training folder")
    twice.add_argument("source", type=Path, metavar="FOLDER|LIST")
    twice.add_argument("--limit", type=value(Share), default=0.05, metavar="X",
        help="l2 of pixels at 64 x 64, between 0 and 1, below which pictures are near-copies (default: %(default)s)")
    twice.add_argument("--out", type=Path, metavar="PNG", help="the contact sheet (default: "
        "results/local/duplicates/<folder>.png)")
    # fmt: on
    args = parser.parse_args(arguments)
    if args.command == "build" and args.size and args.features not in SIZED:
        parser.error(f"--size is for {' and '.join(SIZED)}")
    if args.command in ("build", "import") and (args.features in NETWORKED) != bool(args.model):
        parser.error("--features clip or latents, and --model, go together")
    return args


def shard(text: str) -> tuple[int, int]:
    """``3/8`` as its two numbers."""
    numbers = re.fullmatch(r"(\d{1,9})/(\d{1,9})", text)
    if not numbers or not 1 <= int(numbers[1]) <= int(numbers[2]):
        raise argparse.ArgumentTypeError(f"{text} is no shard I/K, with I from 1 to K")
    return int(numbers[1]), int(numbers[2])


def main(arguments: Arguments = None) -> None:
    """Parse, build or search, print."""
    args = parse(arguments)
    commands = {"build": build, "merge": merge, "import": import_embeddings, "compress": compress, "search": search,
                "duplicates": duplicates}  # fmt: skip
    commands[args.command](args)


def build(args: argparse.Namespace) -> None:
    """``index build``."""
    from memorization.index.build import build_index
    from memorization.index.shards import Shard

    size = tuple(args.size or (64, 64)) if args.features in SIZED else None
    part = Shard(*args.shard) if args.shard else None
    index = build_index(args.source, args.out, args.features, size, args.model, device=args.device, shard=part)
    print(f"{args.out}: {len(index)} pictures, {index.kind}" + (f", {part}" if part else ""))


def merge(args: argparse.Namespace) -> None:
    """``index merge``."""
    from memorization.index.shards import merge as merge_shards

    index = merge_shards(args.shards, args.out)
    print(f"{args.out}: {len(index)} pictures, {index.kind}")


def import_embeddings(args: argparse.Namespace) -> None:
    """``index import``."""
    from memorization.index.imported import import_embeddings as write_imported

    index = write_imported(args.source, args.out, args.features, args.model)
    print(f"{args.out}: {len(index)} pictures, {index.kind}")


def compress(args: argparse.Namespace) -> None:
    """``index compress``."""
    from memorization.index.compress import compress as write_compressed
    from memorization.index.store import Index

    index = Index(args.index, approximately=False)
    print(write_compressed(index, args.index, args.lists, args.code, on_disk=args.on_disk))


def search(args: argparse.Namespace) -> None:
    """``index search``."""
    import torch

    from memorization.index.build import describe_pictures, read_or_skip
    from memorization.index.store import Index

    index = Index(args.index)
    pictures = {path: picture for path in args.pictures if (picture := read_or_skip(path, index.size)) is not None}
    if not pictures:
        raise InputError("none of the pictures can be read")
    vectors = torch.from_numpy(describe_pictures(index.describe, list(pictures.values())))
    for path, distances, rows in zip(pictures, *index.search(vectors, args.k), strict=True):
        print(printable(str(path)))
        for distance, row in zip(distances.tolist(), rows.tolist(), strict=True):
            print(f"  {distance:.3f}  {printable(index.paths[row])}  {printable(index.captions[row])}")
        (times,) = index.multiplicity(rows[None])
        if times > 1:
            print(f"  The caption of the first is that of {times} of these {len(rows)}.")


def duplicates(args: argparse.Namespace) -> None:
    """``index duplicates``."""
    from memorization.index.duplicates import draw, find_duplicates
    from memorization.paths import default_out

    found = find_duplicates(args.source, args.limit)
    for group in found.pictures:
        print(printable(f"near-copies: {', '.join(file.name for file in group)}"))
    for caption, files in found.captions.items():
        print(printable(f"{len(files)} pictures share the caption: {caption}"))
    spare = sum(len(group) - 1 for group in found.pictures)
    print(f"{len(found.pictures)} groups of near-copies (l2 below {args.limit:g}), {spare} pictures to spare; "
          f"{len(found.captions)} captions come more than once")  # fmt: skip
    if found.pictures:
        name = f"{args.source.resolve().stem}.png"
        print(printable(str(draw(found.pictures, args.out or default_out("duplicates", name)))))
