"""Time a distillation step by next-byte distributions against one by token KL, at equal bytes.

    python -m bench.byte_step               # CPU seconds of a step, and their ratio
    python -m bench.byte_step --record      # and a record in bench/records/ (clean tree only)

Both steps read the same texts (the standard library's source), run the student forward and
backward and the teacher forward, and encode the texts themselves. The token KL has a teacher of
the student's tokenizer, the byte KL one of another BPE of like size. Models are random: only the
cost is looked at. One core, fp32; process time, so that other processes count little.
"""

import argparse
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from reflux.kernels.linear_kl import linear_kl
from reflux.tokenalign.byte_table import ByteTable
from reflux.tokenalign.byte_trie import ByteTrie, alphabet
from reflux.tokenalign.byte_windows import ByteWindows, Tokens, byte_windows
from reflux.tokenalign.linear_next_byte import ByteDivergence, byte_kl, next_bytes
from reflux.tokenalign.linear_rows import Linear
from reflux.tokenalign.vocab_map import Vocabulary

from .records import device, git, write

MEASURED = ["tokenalign", "kernels", "bench/byte_step.py"]
SEED, ROUNDS, TEXT_BYTES = 0, 5, 4000
# (hidden size, layers) of student and teacher. In the second the head has the share of the
# parameters that it has in SmolLM2-135M (21 %); in the first nearly twice as much
SIZES = (((256, 4), (384, 6)), ((256, 10), (384, 12)))


class Side(NamedTuple):
    tokenizer: object
    trie: ByteTrie
    stop: int

    def rows(self, texts: list[str]) -> list[list[int]]:
        return [[*self.tokenizer.encode(text).ids, self.stop] for text in texts]

    def windows(self, rows: list[list[int]]) -> ByteWindows:
        ids_R = torch.tensor([i for row in rows for i in row])
        text_R = torch.tensor([m for m, row in enumerate(rows) for _ in row])
        return byte_windows(self.trie, Tokens(ids_R, text_R, torch.zeros_like(ids_R).bool()))


def source() -> str:
    folder = Path(sys.modules["argparse"].__file__).parent
    return "".join(f.read_text(errors="replace") for f in sorted(folder.glob("*.py")))


def trained(text: str, size: int) -> Side:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    letters = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        [text],
        trainers.BpeTrainer(
            vocab_size=size,
            initial_alphabet=letters,
            special_tokens=["<eos>"],
            show_progress=False,
        ),
    )
    table, stop = ByteTable.of(tokenizer), tokenizer.token_to_id("<eos>")
    return Side(tokenizer, ByteTrie.of(Vocabulary(table, [stop])), stop)


def model(side: Side, size: tuple[int, int]):
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(SEED)
    hidden, layers = size
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(side.trie.order_V),
            hidden_size=hidden,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=hidden // 4,
            intermediate_size=3 * hidden,
            tie_word_embeddings=False,
        )
    ).float()


def hidden_of(lm, rows: list[list[int]], gradient: bool) -> Tensor:
    """[T, D] at the predictor of every token; the first one is predicted by id 0."""
    ids_NL = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
    for i, row in enumerate(rows):
        ids_NL[i, 1 : len(row)] = torch.tensor(row[:-1])
    with torch.set_grad_enabled(gradient):
        hidden_NLD = lm.model(ids_NL).last_hidden_state
    return torch.cat([hidden_NLD[i, : len(row)] for i, row in enumerate(rows)])


class Bench:
    def __init__(self, texts: int, sizes: tuple[tuple[int, int], tuple[int, int]]):
        text = source()
        self.own, self.other = trained(text[:700_000], 8000), trained(text[200_000:900_000], 9000)
        self.texts = [text[i * TEXT_BYTES : (i + 1) * TEXT_BYTES] for i in range(texts)]
        self.student = model(self.own, sizes[0])
        self.same, self.foreign = model(self.own, sizes[1]), model(self.other, sizes[1])
        self.symbols = alphabet([self.own.trie, self.other.trie])

    def token_step(self) -> None:
        rows = self.own.rows(self.texts)
        mine, theirs = hidden_of(self.student, rows, True), hidden_of(self.same, rows, False)
        heads = self.student.lm_head.weight, self.same.lm_head.weight
        linear_kl(mine, heads[0], theirs, heads[1], divergence="reverse").total.backward()

    def byte_step(self) -> dict[str, int]:
        rows, others = self.own.rows(self.texts), self.other.rows(self.texts)
        mine, theirs = hidden_of(self.student, rows, True), hidden_of(self.foreign, others, False)
        windows = self.own.windows(rows)
        result = byte_kl(
            Linear(mine, self.student.lm_head.weight),
            self.own.trie,
            windows,
            next_bytes(
                Linear(theirs, self.foreign.lm_head.weight),
                self.other.trie,
                self.other.windows(others),
                symbols=self.symbols,
            ),
            ByteDivergence("reverse"),
            symbols=self.symbols,
        )
        result.total.backward()
        return {
            "student_tokens": len(mine),
            "teacher_tokens": len(theirs),
            "byte_positions": windows.positions,
            "compared": int(result.compared_P.sum()),
        }


def measure(texts: int, sizes: tuple[tuple[int, int], tuple[int, int]]) -> dict:
    bench = Bench(texts, sizes)
    parameters = sum(x.numel() for x in bench.student.parameters())
    embeddings = bench.student.lm_head.weight.numel()
    bench.token_step()
    counts = bench.byte_step()
    seconds: dict[str, list[float]] = {"token_kl": [], "byte_kl": []}
    for _ in range(ROUNDS):
        for name, step in (("token_kl", bench.token_step), ("byte_kl", bench.byte_step)):
            bench.student.zero_grad()
            start = time.process_time()
            step()
            seconds[name].append(time.process_time() - start)
    token, byte = (sorted(seconds[name])[ROUNDS // 2] for name in ("token_kl", "byte_kl"))
    return {
        "texts": texts,
        "vocabularies": [len(s.trie.order_V) for s in (bench.own, bench.other)],
        **counts,
        "cpu_s": {name: [round(x, 3) for x in xs] for name, xs in seconds.items()},
        "ratio_of_medians": round(byte / token, 3),
        "head_share_tied": round(embeddings / (parameters - embeddings), 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.byte_step",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--record", action="store_true", help="write a record")
    parser.add_argument("--texts", type=int, nargs="+", default=[2], help="texts of 4,000 bytes")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    cases = [measure(texts, sizes) for texts in arguments.texts for sizes in SIZES]
    print(*cases, sep="\n")
    if not arguments.record:
        return
    if git("status", "--porcelain", "--", *MEASURED):
        sys.exit("No record: the code that is measured has changes that are not committed.")
    gate = "tests/tokenalign/test_linear_next_byte.py holds the values and gradients"
    fields = {"op": "byte_step", "gate": gate, "seed": SEED, "rounds": ROUNDS}
    fields |= {**device(), "cases": cases}
    print("Recorded in", write("byte_step_cpu", fields, command="python -m bench.byte_step"))


if __name__ == "__main__":
    main()
