"""A local index of training pictures: ``python -m memorization.index build FOLDER --out INDEX``

python -m memorization.index build FOLDER --out INDEX                a folder of pictures; metadata.jsonl for captions
python -m memorization.index build prompts/testbed.csv --out INDEX   a list with columns image and prompt
python -m memorization.index search INDEX picture.png -k 5
python -m memorization.index compress INDEX                          for more than a few 100,000 pictures, by FAISS
"""

from __future__ import annotations

from pathlib import Path

import torch

from memorization.errors import InputError
from memorization.flags import ArgumentParser, run_script
from memorization.index.build import build_index, describe_pictures, read_or_skip
from memorization.index.compress import compress
from memorization.index.descriptors import FEATURES, SIZED
from memorization.index.store import Index


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    make = commands.add_parser("build", help="make an index, or add to it")
    make.add_argument("source", type=Path, help="a folder of pictures, or a list with columns image and prompt")
    make.add_argument("--out", type=Path, required=True, metavar="INDEX")
    make.add_argument("--features", choices=FEATURES, default="pixels", help="default: %(default)s")
    make.add_argument("--model", metavar="FOLDER|HUB_ID", help="clip: the CLIP checkpoint; latents: the Stable "
        "Diffusion checkpoint whose autoencoder it is")  # fmt: skip
    make.add_argument("--size", type=int, nargs=2, metavar=("H", "W"), help="of pixels, or of pictures before they "
        "are encoded to latents (default: 64 64; Stable Diffusion's latents: 512 512)")  # fmt: skip
    make.add_argument("--device", default="auto", help="for the networks of latents, sscd and clip (default: auto)")
    pack = commands.add_parser("compress", help="for more than a few 100,000 pictures: approximate search by FAISS")
    pack.add_argument("index", type=Path)
    pack.add_argument("--lists", type=int, help="of the inverted file (default: 4 sqrt of the pictures)")
    pack.add_argument("--code", type=int, default=64, help="bytes a picture (default: %(default)s)")
    find = commands.add_parser("search", help="the training pictures nearest to pictures of yours")
    find.add_argument("index", type=Path)
    find.add_argument("pictures", nargs="+")
    find.add_argument("-k", type=int, default=5)
    args = parser.parse_args()
    if args.command == "build":
        if args.size and (args.features not in SIZED or min(args.size) < 1):
            parser.error(f"--size is for {' and '.join(SIZED)}, and at least 1 1")
        if (args.features in ("clip", "latents")) != bool(args.model):
            parser.error("--features clip or latents, and --model, go together")
        size = tuple(args.size or (64, 64)) if args.features in SIZED else None
        index = build_index(args.source, args.out, args.features, size, args.model, device=args.device)
        print(f"{args.out}: {len(index)} pictures, {index.kind}")
        return
    index = Index(args.index, approximately=args.command == "search")
    if args.command == "compress":
        print(compress(index, args.index, args.lists, args.code))
        return
    if args.k < 1:
        parser.error("-k is at least 1")
    pictures = {
        name: picture for name in args.pictures if (picture := read_or_skip(Path(name), index.size)) is not None
    }
    if not pictures:
        raise InputError("none of the pictures can be read")
    vectors = torch.from_numpy(describe_pictures(index.describe, list(pictures.values())))
    for name, distances, rows in zip(pictures, *index.search(vectors, args.k), strict=True):
        print(name)
        for distance, row in zip(distances.tolist(), rows.tolist(), strict=True):
            print(f"  {distance:.3f}  {index.paths[row]}  {index.captions[row]}")
        (times,) = index.multiplicity(rows[None])
        if times > 1:
            print(f"  The caption of the first is that of {times} of these {len(rows)}.")


if __name__ == "__main__":
    run_script(main)
