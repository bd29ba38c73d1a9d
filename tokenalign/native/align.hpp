// The aligner: ids -> bytes through a table -> two pointers -> the smallest spans that both sides spell, bytes compared on the way.
// No Python here. The definition is align_spans_ref in tokenalign/spans.py; reads and writes stay inside the arrays given.
//
// A row is walked in windows that stay in the first-level cache. Per window a side is spelled out (16-byte copies, the table's only
// cache miss), the text that both sides have by now is compared by one memcmp, and the two lists of ends are merged without a
// branch on the data: a walk that asks "which side is behind?" mispredicts once a token.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <vector>

namespace reflux {

// What each id spells. Pieces of up to 15 bytes, nearly all that occur, lie in their entry: one cache line a token.
class Table {
  public:
    static constexpr int64_t SLACK = 16;  // bytes that spell() may write past a short piece

    // Piece i is bytes[begin[i] .. begin[i + 1]); begin has size + 1 entries that rise from 0. The table keeps a copy.
    Table(const uint8_t* bytes, const int64_t* begin, int64_t size) : entries_(static_cast<size_t>(size) + 1) {
        for (int64_t i = 0; i < size; ++i) {
            const int64_t len = begin[i + 1] - begin[i];
            if (len > std::numeric_limits<uint32_t>::max()) throw std::invalid_argument("a piece of 4 GiB or more");
            longest_ = std::max(longest_, len);
            uint8_t* entry = entries_[static_cast<size_t>(i) + 1].bytes;
            if (len <= LAST) {
                std::copy_n(bytes + begin[i], len, entry);
                entry[LAST] = static_cast<uint8_t>(len);
            } else {
                const Far far{far_.size(), static_cast<uint32_t>(len)};
                std::memcpy(entry, &far, FAR_BYTES);
                entry[LAST] = FAR;
                far_.insert(far_.end(), bytes + begin[i], bytes + begin[i + 1]);
            }
        }
    }

    int64_t size() const { return static_cast<int64_t>(entries_.size()) - 1; }
    int64_t longest() const { return longest_; }

    // -1 is a known id: a token outside every span, of no bytes.
    bool knows(int32_t id) const { return id >= -1 && id < size(); }

    // Writes what `id` spells to `out`, which has room for its length and SLACK more; returns the length.
    int64_t spell(int32_t id, uint8_t* out) const {
        const uint8_t* entry = entries_[static_cast<size_t>(int64_t{id} + 1)].bytes;
        std::memcpy(out, entry, sizeof(Entry));  // 16 bytes whatever the length: no loop and no branch
        if (entry[LAST] != FAR) return entry[LAST];
        Far far;
        std::memcpy(&far, entry, FAR_BYTES);
        std::memcpy(out, far_.data() + far.at, far.len);
        return far.len;
    }

  private:
    static constexpr int64_t LAST = 15;  // where an entry keeps its length
    static constexpr uint8_t FAR = 255;  // a length that means: the bytes are elsewhere, see Far
    struct alignas(16) Entry {
        uint8_t bytes[LAST + 1] = {};
    };
    struct Far {
        uint64_t at;
        uint32_t len;
    };
    static constexpr size_t FAR_BYTES = sizeof(uint64_t) + sizeof(uint32_t);

    std::vector<Entry> entries_;  // entry 0 is id -1
    std::vector<uint8_t> far_;
    int64_t longest_ = 0;
};

// Some tokens of a row: where each ends, and in TokenRows what they spell.
struct Window {
    static constexpr int64_t TOKENS = 512, TEXT = 16 * TOKENS;

    explicit Window(int64_t longest_piece) : ends(TOKENS), text(static_cast<size_t>(TEXT + longest_piece + Table::SLACK)) {}

    std::vector<int64_t> ends;  // bytes of the row up to the end of each token
    std::vector<uint8_t> text;
};

// Rows of ids, concatenated. Row r is ids[row[r] .. row[r + 1]).
struct TokenRows {
    static constexpr bool SPELLS = true;
    const Table& table;
    const int32_t* ids;  // -1 = outside every span, no bytes
    const int64_t* row;
    const int64_t* trim;  // [trims], rising: tokens, counted over all rows, whose first byte belongs to nobody (a space put in front)
    int64_t trims;
    int32_t* span;  // out, one per token

    int64_t longest() const { return table.longest(); }
    bool is_outside(int64_t token) const { return ids[token] < 0; }

    // Fills `window` with the tokens from `next` on; returns how many, at least one unless ids[next] is not in the table.
    int64_t fill(Window& window, int64_t next, int64_t last, int64_t begin) const {
        const int64_t* trimmed = std::lower_bound(trim, trim + trims, next);
        const int64_t count = std::min(Window::TOKENS, last - next);
        uint8_t* text = window.text.data();
        int64_t at = 0, n = 0;
        for (; n < count && at <= Window::TEXT && table.knows(ids[next + n]); ++n) {
            int64_t len = table.spell(ids[next + n], text + at);
            if (trimmed != trim + trims && *trimmed == next + n) {
                ++trimmed;
                if (len > 0) std::memmove(text + at, text + at + 1, static_cast<size_t>(--len));
            }
            at += len;
            window.ends[static_cast<size_t>(n)] = begin + at;
        }
        return n;
    }
};

// Rows of ends: the bytes were compared elsewhere (a text that does not come back from its ids; offsets.py).
struct EndRows {
    static constexpr bool SPELLS = false;
    const int64_t* end;  // -1 = outside every span
    const int64_t* row;
    int32_t* span;

    int64_t longest() const { return 0; }
    bool is_outside(int64_t token) const { return end[token] < 0; }

    // As TokenRows::fill; the token that it stops at ends before the one in front of it.
    int64_t fill(Window& window, int64_t next, int64_t last, int64_t begin) const {
        const int64_t count = std::min(Window::TOKENS, last - next);
        int64_t n = 0;
        for (; n < count && (end[next + n] == -1 || end[next + n] >= begin); ++n) {
            if (end[next + n] >= 0) begin = end[next + n];
            window.ends[static_cast<size_t>(n)] = begin;
        }
        return n;
    }
};

struct RowResult {
    int64_t spans = 0;
    int64_t equal = 0;  // leading bytes on which the sides agree; 0 for EndRows
    int64_t end_a = 0, end_b = 0;  // bytes of each side
    int64_t bad_a = -1, bad_b = -1;  // position in the row of a token that cannot be: an id outside the table, an end before its start
};

// One side of one row, a window at a time.
template <typename Rows>
class Cursor {
  public:
    Cursor(const Rows& rows, int64_t r, Window& window) : rows_(rows), window_(window), first_(rows.row[r]), last_(rows.row[r + 1]) {}

    // Is there a token to look at? Opens the next window when this one is used up.
    bool ready() {
        if (used < size) return true;
        first_ += size, begin_ = end_, used = size = 0;
        if (first_ == last_ || bad_) return false;
        size = rows_.fill(window_, first_, last_, begin_);
        if (size > 0) end_ = window_.ends[static_cast<size_t>(size) - 1];
        bad_ = size == 0;
        return !bad_;
    }

    const int64_t* ends() const { return window_.ends.data(); }
    int32_t* span() const { return rows_.span + first_; }
    const uint8_t* text_at(int64_t byte) const { return window_.text.data() + (byte - begin_); }
    int64_t end() const { return end_; }  // bytes of the row up to the end of the window
    int64_t token() const { return first_ + used; }
    bool bad() const { return bad_; }

    // Tokens [from, to) that are outside lose the span that the merge wrote.
    void mask(int64_t from, int64_t to) const {
        for (int64_t i = from; i < to; ++i) rows_.span[i] = rows_.is_outside(i) ? -1 : rows_.span[i];
    }

    // The rest of the row, counted and checked only.
    void drain() {
        while (ready()) used = size;
    }

    // Tokens from `open`, the first after the last boundary, on: those of no bytes at the very end join the last span.
    void close(int64_t open, int64_t closed, int64_t spans) const {
        const int32_t past = spans > 0 && end_ == closed ? static_cast<int32_t>(spans - 1) : -1;
        std::fill(rows_.span + open, rows_.span + last_, past);
        mask(open, last_);
    }

    int64_t used = 0, size = 0;  // tokens of the window: looked at, all

  private:
    const Rows& rows_;
    Window& window_;
    int64_t first_, last_;  // tokens, counted over all rows: the window's first, one past the row's last
    int64_t begin_ = 0, end_ = 0;  // bytes of the row before and after the window
    bool bad_ = false;
};

// One thread's room, for any number of rows.
struct Scratch {
    template <typename Rows>
    Scratch(const Rows& a, const Rows& b) : window_a(a.longest()), window_b(b.longest()) {}
    Window window_a, window_b;
};

// Compares what both windows spell, from byte `equal` on. False at the first byte that differs; `equal` stops there.
template <typename Rows>
bool compare(const Cursor<Rows>& x, const Cursor<Rows>& y, int64_t& equal) {
    const int64_t n = std::min(x.end(), y.end()) - equal;
    if (n <= 0) return true;
    const uint8_t *p = x.text_at(equal), *q = y.text_at(equal);
    const bool same = std::memcmp(p, q, static_cast<size_t>(n)) == 0;
    equal += same ? n : std::mismatch(p, p + n, q).first - p;
    return same;
}

// bounds: room for one entry per token of a's row.
template <typename Rows>
RowResult align_row(const Rows& a, const Rows& b, int64_t r, int64_t* bounds, Scratch& scratch) {
    Cursor<Rows> x(a, r, scratch.window_a), y(b, r, scratch.window_b);
    RowResult out;
    int64_t closed = 0, spans = 0, open_x = a.row[r], open_y = b.row[r];
    bool same = Rows::SPELLS;
    while (x.ready() && y.ready()) {
        if (same) same = compare(x, y, out.equal);
        const int64_t *end_x = x.ends(), *end_y = y.ends();
        int32_t *span_x = x.span(), *span_y = y.span();
        int64_t i = x.used, j = y.used;
        int64_t open_i = -1, open_j = -1;
        while (i < x.size && j < y.size) {
            const int64_t ex = end_x[i], ey = end_y[j];
            const bool hit = ex == ey && ex > closed;
            span_x[i] = span_y[j] = static_cast<int32_t>(spans);
            bounds[spans] = ex;  // kept only if the next line counts it; spans <= tokens of a looked at, so it is inside
            spans += hit;
            closed = hit ? ex : closed;
            i += ex <= ey, j += ey <= ex;
            open_i = hit ? i : open_i, open_j = hit ? j : open_j;
        }
        if (open_i >= 0) open_x = x.token() - x.used + open_i, open_y = y.token() - y.used + open_j;
        x.mask(x.token(), x.token() - x.used + i), y.mask(y.token(), y.token() - y.used + j);
        x.used = i, y.used = j;
    }
    x.drain(), y.drain();
    if (x.bad()) out.bad_a = x.token() - a.row[r];
    if (y.bad()) out.bad_b = y.token() - b.row[r];
    if (x.bad() || y.bad()) return out;
    out.spans = spans, out.end_a = x.end(), out.end_b = y.end();
    x.close(open_x, closed, spans), y.close(open_y, closed, spans);
    return out;
}

}  // namespace reflux
