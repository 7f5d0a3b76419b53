"""The prompt lists that the field has published.

python -m memorization.prompts fetch [--from DIR|URL] [--out prompts/published]
"""

from __future__ import annotations

import hashlib
import http.client
import urllib.request
from pathlib import Path
from threading import Thread

from memorization.errors import InputError
from memorization.io.files import is_file, read_file, write_atomically, writing

_ANISOTROPY = "rohanasthana/memorization-anisotropy/97e991bac4171ad0547c5779c31180ea8e9f672e"
_LOCALIZING = "ml-research/localizing_memorization_in_diffusion_models/f952eded64fca0bcf42e0bb3be9a01d64653cfdb"
LARGEST = 2**24  # bytes of a file; the published lists are smaller by far
LONGEST = 120  # seconds for a file, whatever the server does
RAW = "https://raw.githubusercontent.com"
PUBLISHED = {  # name: (repository and commit, sha256)
    "sd1_mem.txt": (_ANISOTROPY, "6f11239c621a7846979170c79d79f86a31441e044a7bc0b5d952ba8a5ca0fb56"),
    "sd1_mem.jsonl": (_ANISOTROPY, "b882b7d82b3fb603769beced712c327e47f7899dfa7c483e0183ec133c221580"),
    "sd1_nmem.txt": (_ANISOTROPY, "628796e195391501591859f55e249cca70e8fcaa7ceb33aac1d753fbfe4d8a4c"),
    "sd2_mem.txt": (_ANISOTROPY, "02f212d64767b4f066ca1c9ddc161a6ea5cf717aadf7f45e44bfe21856563e8d"),
    "sd2_mem.jsonl": (_ANISOTROPY, "fc2f6553f676e8fb94bf5b2eddfef80915131aeca23fa44e49c54edd6968ca74"),
    "RV_mem.txt": (_ANISOTROPY, "a23d5ac7a8f4fbfaa440ef6a793a55331a8a9e3416cda4dc58790b32b96fc392"),
    "RV_nmem.txt": (_ANISOTROPY, "da5fab8a0da55149d394efccc7a71058d9699a51f27bf90d31589cfe7ecfe713"),
    "memorized_laion_prompts.csv": (_LOCALIZING, "0b527a5965dc463e7a3e0d234ff7fd5489b1a76869c456dbb209dc753cb4af25"),
    "unmemorized_laion_prompts.csv": (_LOCALIZING, "f453b418cc157864baacbf68d97447273feac41e8066b2ead6b307bf795988e1"),
}


def fetch(out: Path, source: str | None = None) -> list[Path]:
    """Download the published lists into ``out``; those already there and right are left alone.

    Args:
        source: a folder or URL that holds the files under their names, instead of the public repositories.

    Raises:
        InputError: a file cannot be had, or its sha256 is not the pinned one.
    """
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, (repository, sha256) in PUBLISHED.items():
        path = out / name
        paths.append(path)
        if is_file(path) and hashlib.sha256(read_file(path)).hexdigest() == sha256:
            continue
        origin = f"{source.rstrip('/')}/{name}" if source else f"{RAW}/{repository}/prompts/{name}"
        content = _get(origin)
        found = hashlib.sha256(content).hexdigest()
        if found != sha256:
            raise InputError(f"{origin}: sha256 is {found}, not the pinned {sha256}; nothing was written")
        write_atomically(path, content)
    return paths


def _get(origin: str) -> bytes:
    """The content of a file or URL, in :data:`LONGEST` seconds and not more than :data:`LARGEST` bytes.

    A server may send its answer, headers too, a byte at a time: no time-out of a socket sees that, so a thread waits
    for it, and is left behind when its time is up.
    """
    answer: dict[str, bytes | Exception] = {}
    thread = Thread(target=_receive, args=(origin, answer), daemon=True)
    thread.start()
    thread.join(LONGEST)
    got = answer.get(origin, TimeoutError(f"not whole after {LONGEST} seconds"))
    if isinstance(got, Exception):
        reason = getattr(got, "reason", None) or getattr(got, "strerror", None) or got
        raise InputError(f"{origin}: cannot be had ({reason}); --from DIR|URL names a mirror") from None
    if len(got) > LARGEST:
        raise InputError(f"{origin}: larger than {LARGEST} bytes, which no published list is; nothing was written")
    return got


def _receive(origin: str, answer: dict[str, bytes | Exception]) -> None:
    try:
        if "://" not in origin:
            answer[origin] = read_file(Path(origin))
            return
        with urllib.request.urlopen(origin, timeout=60) as response:
            answer[origin] = response.read(LARGEST + 1)
    except (InputError, OSError, ValueError, http.client.HTTPException) as error:  # URLError is an OSError
        answer[origin] = error
