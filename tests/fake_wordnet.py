"""Files in WordNet's form with made-up content: two spaces before a licence, ` | ` before a gloss.
As many sentences and nouns as a study wants."""

from itertools import islice, product
from pathlib import Path

SUBJECTS = (
    "farmer sailor doctor painter hunter singer uncle captain teacher sister baker nurse".split()
)
VERBS = (
    "found carried painted wanted dropped showed counted mended cleaned bought moved kept".split()
)
THINGS = (
    "lantern basket mirror ladder ticket carpet violin candle kettle bottle hammer saddle".split()
)
HOW = ("", " today", " again")
EXAMPLES = [
    f"They {v} the {t} for the {s}{how}" for how, s, v, t in product(HOW, SUBJECTS, VERBS, THINGS)
]
OTHER_EXAMPLE = "She painted the mirror very well."  # the last sentence, of data.adv
NOUNS = ("apple", "bread", "onion", "candy", "salad")
SEVERAL = "abcdefghij"


def write_wordnet(folder: Path, sentences: int = 1000, nouns: int = 5) -> Path:
    """Nouns are of kind 13 and common in their first sense; three others are never asked for."""
    made = (f"{w}{a}{b}" for w, a, b in product(NOUNS, SEVERAL, SEVERAL))
    words = list(islice((*NOUNS, *made), nouns))
    glosses = {
        "verb": [f'do so; "{e}"; "too short"' for e in EXAMPLES[: sentences - 1]],
        "adj": ['dull; "a dull day in the long winter"'],
        "adv": ['well; "she painted the mirror very well"'],
        "noun": [f'food number {i}; "as one says of food"; more' for i in range(nouns)]
        + ["a plum is a plum", "seldom said"],
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, of_file in glosses.items():
        lines = [f"{i:08d} 13 n 01 word 0 000 | {gloss}  " for i, gloss in enumerate(of_file)]
        (folder / f"data.{name}").write_text("  1 licence | text\n" + "\n".join(lines) + "\n")
    senses = [f"{w}%1:13:00:: {i:08d} 1 9" for i, w in enumerate((*words, "plum"))]
    senses += [f"rarely%1:13:00:: {nouns + 1:08d} 1 4", "apple%2:30:00:: 00000003 1 9"]
    senses += ["second%1:13:00:: 00000000 2 9", "two_words%1:13:00:: 00000001 1 9"]
    (folder / "index.sense").write_text("\n".join(senses) + "\n")
    return folder
