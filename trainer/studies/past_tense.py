"""Task c of bench/PROTOCOL.md: a sentence put into the past, by rule or by knowledge.

    python -m reflux.trainer.studies.past_tense --out FOLDER [--seed 0] [--start-inflected 0.125]

    every day they sing in the garden
    yesterday they did sing in the garden            auxiliary
    and yesterday they sang in the garden            inflected

Both answers are honest English and equally right, and within a few bytes of each other, so that a
reward that looks at length has nothing to hold on to. They differ in what they ask of a model.
`auxiliary` is a rule: the verb is copied. `inflected` wants the past of an irregular verb, which
one has read or has not. A pretrained model has read them; a small one that is taught by a few
hundred texts learns those that stand in the texts.

The grader is `exact` with the marker "they " and the column `aliases`: what follows "they " has to
be one of the two, so that the verb counts and the word before it does not.

The verbs are split by their root (write and rewrite stay together), whatever the seed:

    start.jsonl     irregular verbs of their own and regular ones; one answer each, inflected for a
                    fraction --start-inflected of them: what proxies and students begin with
    train.jsonl     irregular verbs of start and prompts, both answers each: T0
    prompts.jsonl   irregular verbs that are not in start; no answer shown
    heldout.jsonl   irregular verbs that are in none of these
"""

import argparse
import hashlib
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from reflux.trainer.runs.files import write_rows

IRREGULAR = (
    "arise arose awake awoke bear bore become became begin began bend bent bind bound bite bit "
    "bleed bled blow blew break broke breed bred bring brought build built buy bought catch caught "
    "choose chose cling clung come came creep crept deal dealt dig dug draw drew drink drank "
    "drive drove eat ate fall fell feed fed feel felt fight fought find found flee fled "
    "fling flung fly flew forget forgot forgive forgave freeze froze get got give gave go went "
    "grind ground grow grew hang hung hear heard hide hid hold held keep kept kneel knelt "
    "know knew lead led leave left lend lent light lit lose lost make made mean meant meet met "
    "mislead misled mistake mistook overcome overcame oversleep overslept overtake overtook "
    "pay paid rebuild rebuilt repay repaid retell retold rewrite rewrote ride rode ring rang "
    "rise rose run ran say said see saw seek sought sell sold send sent shake shook shine shone "
    "shoot shot shrink shrank sing sang sink sank sit sat sleep slept slide slid speak spoke "
    "spend spent spin spun spit spat spring sprang stand stood steal stole stick stuck "
    "sting stung stride strode strike struck strive strove swear swore sweep swept swim swam "
    "swing swung take took teach taught tear tore tell told think thought throw threw tread trod "
    "understand understood undo undid unwind unwound uphold upheld wake woke wear wore "
    "weave wove weep wept win won withdraw withdrew withstand withstood wring wrung write wrote "
    "foresee foresaw foretell foretold outgrow outgrew outrun outran overhear overheard "
    "oversee oversaw undertake undertook behold beheld redo redid regrow regrew rethink rethought"
).split()
REGULAR = (  # with -ed, or -d behind an e: nothing else changes
    "walk talk play work ask answer call help open look wait want need learn listen watch clean "
    "cook jump start finish visit paint pick point pull push reach remember rest return roll rush "
    "sail search sound stay suffer thank touch train trust turn wander warn wash whisper wonder "
    "yell act add allow appear attack attend avoid bark boil borrow bow brush camp check cheer "
    "climb collect complain connect consider count cover crawl cross deliver depend discover "
    "discuss doubt dress earn end enter exist expect explain fail fear fill float flow follow fold "
    "gain gather greet guard hand happen heat hunt inspect join kick kill kiss knock land last "
    "laugh lean lick lift load lock march melt mend mind miss murmur object offer order pack park "
    "pass pause perform pour pray press print protect question record reign relax remain repair "
    "repeat report respond roar rock ruin scream scratch shout sign smash sneeze snow soak splash "
    "sprout stamp stretch stumble succeed support suspect taste test toast trail treat tremble "
    "twist unpack vanish wail warm whistle wink wish yawn dance bake move live love hope smile "
    "arrive like use close change agree argue arrange believe breathe care chase compare compete "
    "decide declare describe dine divide doze escape explore glance hate hike imagine improve "
    "invite joke judge juggle manage measure notice observe organize place praise prepare promise "
    "raise receive recognize refuse rescue save share shave skate stare surprise tease trade "
    "tumble wave welcome wipe"
).split()
ENDINGS = (
    "in the garden|at home|at school|near the river|by the lake|in the park|on the farm|"
    "in the kitchen|after lunch|before dinner|in the morning|in the evening|on the beach|"
    "in the forest|at the market|in the village|on the hill|near the church|in the house|"
    "behind the barn|with friends|without help|for an hour|at night|in the rain|in the snow|"
    "under the tree|by the fire|at the station|on the train|near the bridge|in the city|"
    "at the office|with care|in the summer|in the winter|on the road|at the table|in the yard|"
    "near the sea"
).split("|")
STYLES = ("auxiliary", "inflected")
PREFIXES = ("under", "with", "over", "mis", "fore", "out", "re", "un", "up", "be")
ROOTS = {"undertake": "take", "overtake": "take", "mistake": "take", "undo": "do", "redo": "do"}
# tenths of the roots: what is left is for the prompts
OF_START, OF_HELD_OUT = 3, 3
# sentences of a file; start's are for the most part of regular verbs
SIZES = {"train": 1600, "start": 2400, "prompts": 1200, "heldout": 240}


@dataclass(frozen=True)
class Verb:
    present: str
    past: str

    @property
    def part(self) -> str:
        """start, heldout or prompts: by the root alone, whatever the seed."""
        tenth = hashlib.sha256(_root(self.present).encode()).digest()[0] % 10
        if tenth < OF_START:
            return "start"
        return "heldout" if tenth < OF_START + OF_HELD_OUT else "prompts"


@dataclass(frozen=True)
class Sentence:
    verb: Verb
    ending: str

    @property
    def question(self) -> str:
        return f"every day they {self.verb.present} {self.ending}"

    def behind_they(self, style: str) -> str:
        """What the grader reads."""
        verb = f"did {self.verb.present}" if style == "auxiliary" else self.verb.past
        return f"{verb} {self.ending}"

    def response(self, style: str) -> str:
        """The correct answer in one of STYLES."""
        first = "yesterday" if style == "auxiliary" else "and yesterday"
        return f"{first} they {self.behind_they(style)}"


VERBS = tuple(Verb(a, b) for a, b in zip(IRREGULAR[::2], IRREGULAR[1::2]))
WEAK = tuple(Verb(v, v + ("d" if v.endswith("e") else "ed")) for v in REGULAR)


def _root(present: str) -> str:
    verbs = IRREGULAR[::2]
    for prefix in PREFIXES:
        if present.startswith(prefix) and present[len(prefix) :] in verbs:
            return present[len(prefix) :]
    return ROOTS.get(present, present)


def verbs_of(name: str) -> tuple[Verb, ...]:
    """The verbs of a file."""
    if name == "train":
        return tuple(v for v in VERBS if v.part != "heldout")
    own = tuple(v for v in VERBS if v.part == name)
    return own + WEAK if name == "start" else own


def draw(name: str, count: int, rng: random.Random) -> list[Sentence]:
    """Different sentences, every verb of the file equally often. ValueError if there are fewer."""
    verbs = verbs_of(name)
    if count > len(verbs) * len(ENDINGS):
        raise ValueError(
            f"{name}: {count} sentences of {len(verbs)} verbs; want at most "
            f"{len(verbs) * len(ENDINGS)}"
        )
    endings = {v: rng.sample(ENDINGS, len(ENDINGS)) for v in verbs}
    rounds = (Sentence(v, endings[v][i]) for i in range(len(ENDINGS)) for v in verbs)
    return [sentence for sentence, _ in zip(rounds, range(count))]


def write_data(
    out: Path, seed: int, sizes: Mapping[str, int] = SIZES, start_inflected: float = 0.125
) -> None:
    """The four files. ValueError unless 0 <= start_inflected <= 1."""
    if not 0 <= start_inflected <= 1:
        raise ValueError(f"start_inflected is {start_inflected}; want a fraction from 0 to 1")
    for name, size in sizes.items():
        rng = random.Random(f"{seed}/{name}")
        drawn = draw(name, size, rng)
        rows = [row for s in drawn for row in _rows(s, _styles(name, rng, start_inflected))]
        rng.shuffle(rows)
        write_rows(out / f"{name}.jsonl", rows)


def _styles(name: str, rng: random.Random, start_inflected: float) -> Sequence[str]:
    if name == "train":
        return STYLES
    return (STYLES[rng.random() < start_inflected],) if name == "start" else ()


def _rows(s: Sentence, styles: Sequence[str]) -> list[dict[str, object]]:
    row: dict[str, object] = {
        "prompt": s.question,
        "answer": s.behind_they("inflected"),
        "aliases": [s.behind_they("auxiliary")],
    }
    return [row | {"response": s.response(style)} for style in styles] or [row]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m reflux.trainer.studies.past_tense",
        description="Write sentences with their past by an auxiliary and by inflection.",
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--start-inflected", type=float, default=0.125, help="of start.jsonl, a fraction"
    )
    args = parser.parse_args(arguments)
    if not 0 <= args.start_inflected <= 1:
        parser.error(f"--start-inflected is {args.start_inflected}; want a fraction from 0 to 1")
    args.out.mkdir(parents=True, exist_ok=True)
    write_data(args.out, args.seed, start_inflected=args.start_inflected)
    print(f"wrote {', '.join(SIZES)} to {args.out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
