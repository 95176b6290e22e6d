"""Writes the texts behind docs/kv-cache.md: one to calibrate on, six to judge by, which share nothing.

python benchmarks/kv_texts.py FOLDER

They are parts of what Debian 12 and Python 3.11.7 bring (packages base-files, coreutils, gettext, gnupg,
libc6, libpng16-16, libslang2, linux-libc-dev, lsof, nettle-dev, nodejs, openssl, perl-modules-5.36, readline-common,
systemd, valgrind, wget).
"""

from __future__ import annotations

import gzip
import html
import importlib
import inspect
import re
import sys
from pathlib import Path

SHARE = Path("/usr/share")
CALIBRATION_CHARACTERS = 16_000
"""Of each of the 28 parts: a stretch of 2048 tokens lies well within one."""
JUDGED_BYTES = 80_000


def read(path: Path) -> str:
    data = path.read_bytes()
    return (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8", "replace")


def source(module: str) -> str:
    return inspect.getsource(importlib.import_module(module))


def calibration_text() -> str:
    topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    parts = [
        "\n\n".join(topics.values()),
        read(SHARE / "common-licenses/GPL-3"),
        read(SHARE / "doc/nodejs/api/fs.md"),
        source("tarfile"),
        read(SHARE / "info/gettext.info.gz")[3000:],
        read(Path("/usr/include/linux/bpf.h")),
        read(SHARE / "info/gnupg.info-1.gz")[3000:],
        source("asyncio.base_events"),
        read(SHARE / "doc/openssl/changelog.gz"),
        read(SHARE / "common-licenses/MPL-2.0"),
        read(SHARE / "info/wget.info.gz")[3000:],
        source("statistics"),
        read(SHARE / "doc/nodejs/api/stream.md"),
        read(SHARE / "info/nettle.info.gz")[3000:],
        read(SHARE / "doc/nodejs/api/http.md"),
        source("subprocess"),
        read(SHARE / "doc/libc6/NEWS.gz"),
        read(Path("/usr/include/linux/nl80211.h"))[3000:],
        read(SHARE / "common-licenses/GFDL-1.3"),
        read(SHARE / "doc/libpng16-16/libpng-manual.txt.gz")[3000:],
        source("typing"),
        read(SHARE / "perl/5.36/pod/perldiag.pod"),
        read(SHARE / "doc/nodejs/api/crypto.md"),
        read(SHARE / "doc/libslang2/slang.txt.gz")[20_000:],
        source("datetime"),
        read(SHARE / "doc/lsof/00FAQ.gz")[12_000:],
        read(Path("/usr/include/linux/videodev2.h"))[3000:],
        source("threading"),
    ]
    return "".join(part[:CALIBRATION_CHARACTERS] + "\n\n" for part in parts)


def judged_texts() -> dict[str, str]:
    valgrind = html.unescape(re.sub(r"<[^>]+>", "", read(SHARE / "doc/valgrind/html/manual-core.html")))
    return {
        "1-coreutils.txt": read(SHARE / "info/coreutils.info.gz")[40_000:],
        "2-valgrind.txt": valgrind[12_000:],
        "3-mock.py": source("unittest.mock"),
        "4-systemd-news.txt": read(SHARE / "doc/systemd/NEWS.gz"),
        "5-readline.txt": read(SHARE / "info/rluserman.info.gz")[4000:],
        "6-decimal.py": source("_pydecimal"),
    }


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "calibration.txt").write_text(calibration_text(), encoding="utf-8")
    for name, text in judged_texts().items():
        (folder / name).write_bytes(text.encode()[:JUDGED_BYTES].decode("utf-8", "ignore").encode())


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("give the folder to write to: python benchmarks/kv_texts.py FOLDER")
    main(Path(sys.argv[1]))
