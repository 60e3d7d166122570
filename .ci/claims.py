"""List the numbers in the prose of the lessons that no cell computes, asserts or prints: each wants a source.

A number counts as covered where it stands in the code or the stored output of its lesson, or in a sentence that names a
source. Small counts in words ("four wings") are not numbers here. `python .ci/claims.py [NOTEBOOK ...]`
"""
import re
import sys
from pathlib import Path

import nbformat

NBS = Path(__file__).resolve().parent.parent / "nbs"
NUMBER = re.compile(r"(?<![\w.,^_{/-])\d[\d,]*(?:\.\d+)?(?:e-?\d+)?(?![\w/])")
# Not numbers that anybody measures: links, code, formulas, and what names a place in the course or in a paper.
ELSEWHERE = re.compile(
    r"```.*?```|`[^`]*`|\$\$.*?\$\$|\$[^$]*\$|<[^>]+>|\b\d\d_\w+|^\|.*$|^\d+\. |^#+ .*$"
    r"|\b(?:[Ll]essons?|[Ss]ections?|[Ee]quations?|[Tt]ables?|[Ff]igures?|[Cc]hapters?|version|step|steps|seeds?|commit|torch|"
    r"Python|Stable Diffusion|SD|CUDA|pages?|exercises?)\s+\d[\d.,]*(?:(?:\s+to\s+|,\s+|\s+and\s+|\s+or\s+)\d[\d.]*)*",
    re.DOTALL | re.MULTILINE,
)
# A year is one where a name or a month stands before it: "Kingma and Welling 2013", not "after 2000 steps".
SOURCE = re.compile(r"\b(?:et al\b|[A-Z]\w+ (?:19|20)\d\d\b|says its|model card|published|guide|script|paper)")


def plain(number: str) -> str:
    """A number as it would be written in code: 65,536 is 65536, 30.0 is 30."""
    text = re.sub("[,_]", "", number)
    return text.rstrip("0").rstrip(".") if "." in text else text


def numbers_of(text: str) -> set[str]:
    """All numbers of a text; of a share also its percentage, of a value its rounded ones."""
    found = {plain(each) for each in re.findall(r"\d{1,3}(?:[,_]\d{3})+(?:\.\d+)?|\d+(?:\.\d+)?", text)}
    for each in list(found):
        value = float(each)
        found |= {plain(f"{value:.{places}f}") for places in (0, 1, 2)}
        found |= {plain(f"{100 * value:.{places}f}") for places in (0, 1)}
    return found


def uncovered(path: Path) -> list[tuple[str, str]]:
    """The numbers of a notebook's prose that nothing in it covers, each with its sentence."""
    cells = nbformat.read(path, as_version=4).cells
    known = set()
    for cell in cells:
        if cell.cell_type == "code":
            said = [output.get("text", "") or output.get("data", {}).get("text/plain", "") for output in cell.outputs]
            known |= numbers_of("\n".join([cell.source, *map(str, said)]))
    open_ones = []
    for cell in cells:
        if cell.cell_type != "markdown":
            continue
        sourced = re.sub(r"`benchmarks/[^`]*`", "published", cell.source).replace("et al.", "et al")
        text = ELSEWHERE.sub(" ", re.sub(r"\[(?:\d\d\]|([^\]]*)\])\([^)]*\)", r"\1", sourced))
        for sentence in re.split(r"(?<=[.:;?!])\s+|\n\s*\n", text):
            if SOURCE.search(sentence):
                continue
            open_ones += [(each.group(), " ".join(sentence.split())) for each in NUMBER.finditer(sentence)
                          if plain(each.group()) not in known and float(plain(each.group())) > 12]  # fmt: skip
    return open_ones


def main() -> None:
    """Print them, lesson by lesson."""
    paths = [Path(word) for word in sys.argv[1:]] or sorted(NBS.rglob("[0-9]*.ipynb"))
    total = 0
    for path in paths:
        found = uncovered(path)
        total += len(found)
        for number, sentence in found:
            print(f"{path.stem}: {number}: {sentence[:160]}")
    print(f"{total} numbers in prose that no cell of their lesson covers")


if __name__ == "__main__":
    main()
