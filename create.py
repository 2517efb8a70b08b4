#!/usr/bin/env python3
"""Makes a CLIP embedding of every image below a folder and indexes it, for search.py to find."""

import argparse
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from imagesearch import cli
from imagesearch.embed import Document, Stored, Unreadable, batched, cores, embed
from imagesearch.errors import Misuse
from imagesearch.files import File, as_text, clean, local_path, reason, shown, walk
from imagesearch.index import Index
from imagesearch.models import ModelRecord, load_model
from imagesearch.report import Interrupt, Report

EXAMPLES = """\
  python3 create.py                          index ./images
  python3 create.py --images ~/photos --prune
                                             also forget the photos that are gone
  python3 create.py --model thumbnail --index tryout
                                             try it without downloading CLIP
"""

PAGE = 1000  # files looked up in the index at once


def main() -> int:
    arguments = parse()
    report, interrupt = Report(), Interrupt()

    def pause(seconds: float, why: str) -> bool:
        report.say(why)
        return interrupt.wait(seconds)

    with cli.open_index(arguments, pause, arguments.patience) as index:
        check_folder(arguments.images)
        exists = index.model() is not None  # asked before CLIP is downloaded, to fail sooner
        model = load_model(arguments.model, threads=1)
        if not exists:
            index.create(model.record)
        check_model(index.model(), model.record, arguments)  # another run may have created it meanwhile
        with interrupt, report:
            if report.shown:
                everything = interrupt.until(quiet_walk(arguments.images))
                report.expect(sum(1 for file in everything if arguments.part.has(file.id)))
            files = walk(arguments.images, report.pass_over, report.cannot_read)
            ours = (file for file in interrupt.until(files) if arguments.part.has(file.id))
            index.refresh()  # what a run that was killed has written is not to be embedded again
            changed = compare(ours, index, report)
            documents = readable(embed(interrupt.until(changed), model, workers=cores()), report)
            for document in index.write(documents):
                report.wrote(document)
            if arguments.prune and not interrupt.signal:
                report.deleted = prune(index, arguments.images, arguments.part)
            index.refresh()
    if interrupt.signal:
        return 128 + interrupt.signal
    return 1 if report.unreadable else 0


def parse() -> argparse.Namespace:
    parser = cli.Parser(__doc__, EXAMPLES)
    parser.add_argument(
        "--images", metavar="DIR", type=clean, default=clean("images"), help="the folder (default: images)"
    )
    parser.add_argument(
        "--model",
        metavar="NAME|FILE",
        default="clip",
        help="clip (default; downloaded once), thumbnail (built in, 16x16 pixels),"
        " or an ONNX file with imgbeddings' input and output",
    )
    parser.add_argument("--prune", action="store_true", help="delete the documents below DIR whose files are gone")
    parser.add_argument(
        "--part",
        metavar="I/N",
        type=part,
        default=Part(1, 1),
        help="only the I-th of N parts of the images, for N machines that share the folder (default: 1/1)",
    )
    parser.add_argument(
        "--patience",
        metavar="SECONDS",
        type=seconds,
        default=120,
        help="how long to wait for an Elasticsearch that goes away during the run (default: 120)",
    )
    parser.add_index_options()
    return parser.parse_args()


def seconds(text: str) -> float:
    """A number of seconds for --patience."""
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError("must be a number of seconds")
    return value


@dataclass(frozen=True)
class Part:
    """The `number`-th of `of` parts of the images; together they are all, and no image is in two."""

    number: int
    of: int

    def has(self, name: str) -> bool:
        """Whether the document with this `_id`, a SHA-256 in hex, is in this part."""
        return int(name[:16], 16) % self.of == self.number - 1


def part(text: str) -> Part:
    """The part that `2/5` names."""
    found = re.fullmatch(r"([1-9]\d{0,5})/([1-9]\d{0,5})", text, re.ASCII)
    if not found or int(found[1]) > int(found[2]):
        raise argparse.ArgumentTypeError("must be I/N with I from 1 to N, for example 2/5")
    return Part(int(found[1]), int(found[2]))


def quiet_walk(folder: str) -> Iterator[File]:
    """The image files below `folder`, with nothing said of the rest."""
    return walk(folder, lambda path: None, lambda path, reason: None)


def check_folder(folder: str) -> None:
    """Raises Misuse where `folder` cannot be listed or has no images."""
    try:
        os.scandir(folder).close()
    except OSError as error:
        raise Misuse(
            f"{shown(folder)}: {reason(error)}. Put your images there, or name their folder with --images."
        ) from None
    if next(quiet_walk(folder), None) is None:
        raise Misuse(f"There are no images below {shown(folder)}. Put some there, or name their folder with --images.")


def check_model(made_by: ModelRecord | None, model: ModelRecord, arguments: argparse.Namespace) -> None:
    """Raises Misuse where the index was made by another model: the two kinds of embedding cannot be compared."""
    if made_by and not made_by.same_as(model):
        raise Misuse(
            f"The index {arguments.index} was made with --model {shown(made_by.model)}, which differs from"
            f" {shown(model.model)}: use the same model, or another index with --index."
        )


def compare(files: Iterable[File], index: Index, report: Report) -> Iterator[tuple[File, Stored | None]]:
    """The files that the index does not have as they are, each with what it has of them."""
    for page in batched(files, PAGE):
        stored = index.stored([file.id for file in page])
        for file in page:
            known = stored.get(file.id)
            if known and (known.size, known.mtime) == (file.size, file.mtime):
                report.leave()
            else:
                yield file, known


def readable(results: Iterable[Document | Unreadable], report: Report) -> Iterator[Document]:
    """The documents among `results`; the rest is reported."""
    for result in results:
        if isinstance(result, Document):
            yield result
        else:
            report.cannot_read(result.path, result.reason)


def prune(index: Index, folder: str, part: Part) -> int:
    """Deletes the documents of `part` below `folder` whose files are gone; gives how many."""
    return sum(
        index.delete([name for name, file_path in page if part.has(name) and gone(local_path(file_path))])
        for page in batched(index.paths(as_text(folder)), PAGE)
    )


def gone(path: str) -> bool:
    """Whether there is no such file. One that cannot be looked at is not gone."""
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return True
    except OSError:
        return False
    return False


if __name__ == "__main__":
    cli.run(main)
