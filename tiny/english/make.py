"""Pack the two npm data sets into the files beside this script: python make.py node_modules/@stdlib"""

import lzma
import re
import sys
from pathlib import Path

ASCII = str.maketrans({"—": " - ", "–": "-", "’": "'", "‘": "'", "“": '"', "”": '"', "…": "..."})


def clean(text: str) -> str:
    text = text.translate(ASCII).encode("ascii", "ignore").decode()
    return re.sub(r"[ \t]+", " ", re.sub(r"\s*\n\s*", "\n", text)).strip()


def main(packages: Path) -> None:
    number = re.compile(r"\d+")
    chapters = packages.glob("datasets-moby-dick/data/chapter_*.txt")
    chapters = sorted(chapters, key=lambda f: int(number.search(f.stem)[0]))
    addresses = sorted(f for f in packages.glob("datasets-sotu/data/*.txt") if int(number.match(f.stem)[0]) >= 1934)
    for name, files in (("moby-dick", chapters), ("sotu", addresses)):
        text = "\f".join(clean(f.read_text(encoding="utf8")) for f in files)
        packed = lzma.compress(text.encode(), preset=9 | lzma.PRESET_EXTREME)
        Path(__file__).with_name(f"{name}.txt.xz").write_bytes(packed)
        print(f"{name}: {len(files)} documents, {len(text)} characters")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
