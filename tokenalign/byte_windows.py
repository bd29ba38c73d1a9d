"""Next-byte distributions of many texts along the tokens that they are given in, without a further
forward: which masses of which softmax they need, and how those are put together.

At a byte position the covers (`next_byte`) that follow the text's own tokens are those that start
at the end of one of them and reach beyond the position. Their weights differ by the probabilities
of the text's own tokens between those ends:

    text    u n h a p p y        tokens  un | happy
    behind "un"   from the start: p(unit) + p(unhappy) + ...           tokens that begin with "un"
                  from behind "un": p(un) * p(every token | un)
    behind "unh"  from the start: p(unhappy) + ...
                  from behind "un": p(un) * p(happy | un) + ...

What this leaves out is measured position by position: tokens off the text's own list that end since
its last boundary (behind "h", the token "h"), and ids that are neither text nor stop. Their share
bounds the error in total variation, as long as no model spells in another way what it has merged:
whoever does not know that of a model compares its sampled ids with the canonical ones
(`canonical_share`). So at the boundaries of a canonical text the distribution is exact, and inside
a token it is where the shorter token is unlikely.

Shapes: R tokens ("rows"), P byte positions, B bytes, M texts, W windows (row, trie node), E their
children, X those windows whose node is a token.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .byte_trie import END, SYMBOLS, ByteTrie

TINY = 1e-290  # beside it a text's own tokens have no weight left: everything is missing
FLOOR = 1e-30  # share of a symbol that nothing spells; its log is -69


class Tokens(NamedTuple):
    """One side of many texts, one after another, each token with its own predictor row."""

    ids_R: Tensor  # the stop id included where the text ended by itself
    text_R: Tensor  # which text: equal for the neighbours of one text
    # bool, of a text's first token: its first byte is a space that the tokenizer put there
    space_R: Tensor


class ByteWindows(NamedTuple):
    """What `next_byte_logprob` needs of the texts, without any model's numbers.

    The masses wanted of row r's softmax, in the trie's order of ids: those of the entries, those of
    the windows' own nodes, that of the stop ids and that of the control ids.
    """

    ids_R: Tensor
    first_R: Tensor  # first row of the row's text
    at_R: Tensor  # its first position
    root_R: Tensor  # bool: nothing is known of the row's token (no space was put in front)
    byte_P: Tensor  # the byte that follows each position, END at the end of a finished text
    row_P: Tensor  # the last row that starts at or before the position
    reference_P: Tensor  # the row whose weight is 1
    # windows: from row_W on the text spells a node, up to the position at_W
    row_W: Tensor
    at_W: Tensor
    # entries, the children of the windows' nodes: ids begin : end go on with the symbol
    window_E: Tensor  # int32
    symbol_E: Tensor  # int16
    begin_E: Tensor  # int32
    end_E: Tensor  # int32
    # windows whose node is a token, by ids begin : end
    window_X: Tensor
    own_X: Tensor  # bool: it is the text's own token
    begin_X: Tensor
    end_X: Tensor
    starts_R: Tensor  # [R + 1, 4] on the host: each row's first position, window, entry, exact one
    text_rows: tuple[int, ...]  # [M + 1] first row of each text

    @property
    def positions(self) -> int:
        return len(self.byte_P)

    def rows(self, start: int, end: int) -> "ByteWindows":
        """Those of whole texts, rows start : end."""
        (p, w, e, x), (p1, w1, e1, x1) = (self.starts_R[i].tolist() for i in (start, end))
        s = self
        return s._replace(
            ids_R=s.ids_R[start:end],
            first_R=s.first_R[start:end] - start,
            at_R=s.at_R[start:end] - p,
            root_R=s.root_R[start:end],
            byte_P=s.byte_P[p:p1],
            row_P=s.row_P[p:p1] - start,
            reference_P=s.reference_P[p:p1] - start,
            row_W=s.row_W[w:w1] - start,
            at_W=s.at_W[w:w1] - p,
            window_E=s.window_E[e:e1] - w,
            symbol_E=s.symbol_E[e:e1],
            begin_E=s.begin_E[e:e1],
            end_E=s.end_E[e:e1],
            window_X=s.window_X[x:x1] - w,
            own_X=s.own_X[x:x1],
            begin_X=s.begin_X[x:x1],
            end_X=s.end_X[x:x1],
            starts_R=s.starts_R[start : end + 1] - s.starts_R[start],
            text_rows=tuple(r - start for r in s.text_rows if start <= r <= end),
        )


def byte_windows(trie: ByteTrie, tokens: Tokens) -> ByteWindows:
    """Positions are in the order of the texts: before every byte of theirs, and behind the last one
    of a text that ended with a stop id. ValueError for an id without bytes inside a text.
    """
    ids_R, device = tokens.ids_R, tokens.ids_R.device
    R = len(ids_R)
    new_R = torch.ones(R, dtype=torch.bool, device=device)
    new_R[1:] = tokens.text_R[1:] != tokens.text_R[:-1]
    ended_R = torch.roll(new_R, -1) & (trie.lens_V[ids_R] == 0)
    if bool((trie.lens_V[ids_R] == 0)[~ended_R].any()):
        raise ValueError(
            "byte_windows: a token without bytes inside a text; want text, and a stop id at most "
            "at its end. Leave texts with control ids out"
        )
    skip_R = (tokens.space_R & new_R).long()
    lens_R = trie.lens_V[ids_R] - skip_R
    text_rows = [*new_R.nonzero()[:, 0].tolist(), R]
    byte_P, at_R, end_R = _positions(trie, ids_R, new_R, lens_R + ended_R.long(), skip_R)
    row_W, node_W, at_W = _walk(trie, at_R, end_R, byte_P, skip_R)
    row_P = torch.searchsorted(at_R, torch.arange(len(byte_P), device=device), right=True) - 1
    earliest_P = torch.full_like(byte_P, R).scatter_reduce(0, at_W, row_W, "amin")
    count_W = trie.children_N[node_W]
    window_E = torch.repeat_interleave(count_W)
    first_W = count_W.cumsum(0) - count_W
    child_E = (trie.child_N[node_W] - first_W)[window_E]
    child_E += torch.arange(len(window_E), device=device)
    window_X = (trie.exact_N[node_W] > 0).nonzero()[:, 0]
    own_W = lens_R[row_W] == at_W - at_R[row_W]
    windows_R = torch.bincount(row_W, minlength=R)
    entries_R = torch.zeros_like(at_R).index_add(0, row_W, count_W)
    exact_R = torch.bincount(row_W[window_X], minlength=R)
    slots_R = lens_R + ended_R.long()
    counts_R = torch.stack([slots_R, windows_R, entries_R, exact_R], 1).cpu()
    begin_X = trie.begin_N[node_W[window_X]]
    rows = torch.arange(R, device=device)
    return ByteWindows(
        ids_R,
        torch.where(new_R, rows, 0).cummax(0).values if R else rows,
        at_R,
        skip_R == 0,
        byte_P,
        row_P,
        earliest_P[at_R[row_P]],
        row_W,
        at_W,
        window_E.int(),
        trie.byte_N[child_E].short(),
        trie.begin_N[child_E].int(),
        trie.end_N[child_E].int(),
        window_X,
        own_W[window_X],
        begin_X,
        begin_X + trie.exact_N[node_W[window_X]],
        torch.cat([counts_R.new_zeros(1, 4), counts_R.cumsum(0)]),
        tuple(text_rows),
    )


def _positions(
    trie: ByteTrie, ids_R: Tensor, new_R: Tensor, slots_R: Tensor, skip_R: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """byte_P; the position of each token's start; the end of its text's positions."""
    at_R = slots_R.cumsum(0) - slots_R
    byte_P = torch.full((int(slots_R.sum()),), END, device=ids_R.device)
    full_R = trie.lens_V[ids_R]
    row_B = torch.repeat_interleave(full_R)
    within_B = torch.arange(len(row_B), device=row_B.device) - (full_R.cumsum(0) - full_R)[row_B]
    within_B -= skip_R[row_B]  # a space in front has no position
    kept_B = within_B >= 0
    byte_P[(at_R[row_B] + within_B)[kept_B]] = trie.spell(ids_R)[kept_B]
    text_R = new_R.long().cumsum(0) - 1
    end_M = torch.zeros_like(at_R).scatter_reduce(0, text_R, at_R + slots_R, "amax")
    return byte_P, at_R, end_M[text_R]


def _walk(
    trie: ByteTrie, at_R: Tensor, end_R: Tensor, byte_P: Tensor, skip_R: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Every (row, node, position) such that the text spells the node from the row's start up to the
    position; in the order of the rows.
    """
    row, at = torch.arange(len(at_R), device=at_R.device), at_R
    space = torch.full_like(row, ord(" "))
    node = torch.where(skip_R > 0, trie.children(torch.zeros_like(row), space), 0)
    found = [(row[:0], row[:0], row[:0])]
    while len(row):
        inside = (at < end_R[row]) & (node >= 0)
        row, node, at = row[inside], node[inside], at[inside]
        found.append((row, node, at))
        node = trie.children(node, byte_P[at])
        row, at, node = row[node >= 0], at[node >= 0] + 1, node[node >= 0]
    row_W, node_W, at_W = (torch.cat(x) for x in zip(*found))
    order = torch.sort(row_W, stable=True).indices
    return row_W[order], node_W[order], at_W[order]


class RowMasses(NamedTuple):
    """What the windows want of the rows' softmax; float64."""

    entry_E: Tensor
    exact_X: Tensor
    stop_R: Tensor
    control_R: Tensor
    logp_R: Tensor  # log p of the row's own id
    unknown_R: Tensor  # mass of ids that are not told apart: missing wherever they may end


class NextBytes(NamedTuple):
    """Of P positions."""

    logp_PS: Tensor  # [P, 257] log P(symbol | bytes so far); what is missing is spread evenly
    # [P] share that was left out: bounds the error of the distribution in total variation
    missing_P: Tensor
    # [P] log of the probability of the bytes so far, nats, behind its text's own prompt
    prefix_P: Tensor


def next_byte_logprob(
    w: ByteWindows, masses: RowMasses, symbols: Tensor | None = None
) -> NextBytes:
    """Distributions over 256 bytes and the end at every position, float64.

    Differentiable in the masses, but for `missing_P`. symbols: bool [257], those that count
    (`byte_trie.alphabet`): the mass of all others is missing.
    """
    before_R = masses.logp_R.cumsum(0) - masses.logp_R
    weight_W = (before_R[w.row_W] - before_R[w.reference_P[w.at_W]]).exp()
    weight_R = torch.where(w.root_R, (before_R - before_R[w.reference_P[w.at_R]]).exp(), 0.0)
    cell_E = w.at_W[w.window_E] * SYMBOLS + w.symbol_E
    mass_PS = weight_W.new_zeros(w.positions * SYMBOLS)
    mass_PS = mass_PS.index_add(0, cell_E, weight_W[w.window_E] * masses.entry_E)
    mass_PS = mass_PS.index_add(0, w.at_R * SYMBOLS + END, weight_R * masses.stop_R)
    mass_PS = mass_PS.view(-1, SYMBOLS)
    missing_P = _missing(w, masses, weight_W.detach(), weight_R.detach())
    if symbols is not None:
        missing_P = missing_P + mass_PS.detach()[:, ~symbols].sum(1)
        mass_PS = torch.where(symbols, mass_PS, 0.0)
    all_P = (mass_PS.sum(1) + missing_P).clamp(min=TINY)
    spread_P1 = (missing_P / SYMBOLS + FLOOR * all_P.detach() + TINY)[:, None]
    logp_PS = (mass_PS + spread_P1).log()
    logp_PS = logp_PS - logp_PS.logsumexp(1, keepdim=True)
    first_P = w.first_R[w.row_P]
    prefix_P = all_P.log() + before_R[w.reference_P] - before_R[first_P]
    share_P = torch.where(all_P > TINY, missing_P / all_P, 1.0).detach()
    return NextBytes(logp_PS, share_P, prefix_P)


@torch.no_grad()
def _missing(w: ByteWindows, masses: RowMasses, weight_W: Tensor, weight_R: Tensor) -> Tensor:
    """[P] what was left out since the last boundary, in the unit of the position's masses: tokens
    off the text's own list that end there, and control ids.
    """
    own_X = torch.where(w.own_X, masses.logp_R.exp()[w.row_W[w.window_X]], 0.0)
    alone_X = w.own_X & (w.end_X - w.begin_X == 1)  # nothing else: no rounding error is left over
    off_X = torch.where(alone_X, 0.0, (masses.exact_X - own_X).clamp(min=0))
    off_X = weight_W[w.window_X] * off_X
    lost_P = off_X.new_zeros(w.positions).index_add(0, w.at_W[w.window_X], off_X)
    lost_P = lost_P.index_add(0, w.at_R, weight_R * masses.control_R.clamp(min=0))
    total_P, segment_P = lost_P.cumsum(0), w.at_R[w.row_P]
    missing_P = (total_P - total_P[segment_P]).clamp(min=0) + lost_P[segment_P]
    return missing_P.index_add(0, w.at_W, weight_W * masses.unknown_R[w.row_W])


def settled_prefix_logp(w: ByteWindows, masses: RowMasses) -> Tensor:
    """[P] log of the probability of the bytes so far, nats, by what no later byte can change.

    Let i be the first row from which some token of the vocabulary still spells all bytes up to the
    position. Every row before it is settled, and the value is

        log p(tokens before i) + log p(a token that begins with the bytes since | tokens before i)

    a function of the bytes so far alone where the tokenizer takes the longest match; then it is
    the byte-prefix probability of a model that spells in one way. `NextBytes.prefix_P` follows the
    text's own tokens further, and so depends on what comes.
    """
    before_R = masses.logp_R.cumsum(0) - masses.logp_R
    nodes = w.row_W.new_zeros(len(w.row_W), dtype=torch.float64)
    mass_W = nodes.index_add(0, w.window_E, masses.entry_E)
    mass_W = mass_W.index_add(0, w.window_X, masses.exact_X)
    root_W = w.root_R[w.row_W] & (w.at_W == w.at_R[w.row_W])
    value_W = torch.where(root_W, 0.0, mass_W.clamp(min=TINY).log()) + before_R[w.row_W]
    first_P = torch.full_like(w.byte_P, len(w.ids_R)).scatter_reduce(0, w.at_W, w.row_W, "amin")
    settled_W = (w.row_W == first_P[w.at_W]).nonzero()[:, 0]
    value_P = value_W.new_zeros(w.positions).index_copy(0, w.at_W[settled_W], value_W[settled_W])
    return value_P - before_R[w.first_R[w.row_P]]
