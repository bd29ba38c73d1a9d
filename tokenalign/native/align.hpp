// The aligner: ids -> bytes through a table -> two pointers -> the smallest spans that both sides spell, bytes compared on the way.
// No Python here. The definition is align_spans_ref in tokenalign/spans.py; reads and writes stay inside the arrays given.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>

namespace reflux {

// Piece i is bytes[begin[i] .. begin[i + 1]); ids that spell no text have an empty piece.
struct Table {
    const uint8_t* bytes;
    const int64_t* begin;  // [size + 1]
    int64_t size;
};

// Rows of one tokenization, concatenated. Row r is ids[row[r] .. row[r + 1]).
struct Rows {
    Table table;
    const int32_t* ids;   // -1 = outside every span, no bytes
    const int64_t* row;
    const int32_t* skip;  // per row: bytes to drop from its first token with bytes (a space the tokenizer put in front)
    int32_t* span;        // out, one per token
};

struct RowResult {
    int64_t spans = 0;
    int64_t equal = 0;  // leading bytes on which the sides agree
    int64_t end_a = 0, end_b = 0;  // bytes that each side spells
    int64_t bad_a = -1, bad_b = -1;  // position in the row of an id outside the table
};

class Cursor {
  public:
    Cursor(const Rows& rows, int64_t r) : rows_(rows), next_(rows.row[r]), last_(rows.row[r + 1]), skip_(rows.skip[r]) {}

    bool done() const { return next_ == last_; }
    int64_t end() const { return end_; }
    int64_t left() const { return left_; }
    int64_t next() const { return next_; }
    const uint8_t* at() const { return at_; }

    // Open the next token and give it a span. False when its id is outside the table.
    bool take(int32_t span) {
        const int32_t id = rows_.ids[next_];
        if (id < -1 || id >= rows_.table.size) return false;
        left_ = 0;
        if (id >= 0) {
            at_ = rows_.table.bytes + rows_.table.begin[id];
            left_ = rows_.table.begin[id + 1] - rows_.table.begin[id];
            const int64_t cut = std::min<int64_t>(skip_, left_);
            at_ += cut, left_ -= cut;
            if (cut > 0) skip_ = 0;
        }
        end_ += left_;
        rows_.span[next_++] = span;
        return true;
    }

    void consume(int64_t n) { at_ += n, left_ -= n; }

  private:
    const Rows& rows_;
    int64_t next_, last_;  // token indices
    int64_t skip_;
    int64_t end_ = 0;  // bytes of the tokens taken
    int64_t left_ = 0;  // bytes of the current token not compared yet
    const uint8_t* at_ = nullptr;
};

// Tokens after the last boundary: those of no bytes at the very end join the last span, the others are outside. So are masked ones.
inline void close_row(const Rows& rows, int64_t r, int64_t end, int64_t closed, int32_t spans) {
    const int32_t past = spans > 0 && end == closed ? spans - 1 : -1;
    for (int64_t i = rows.row[r]; i < rows.row[r + 1]; ++i) {
        if (rows.ids[i] < 0) rows.span[i] = -1;
        else if (rows.span[i] == spans) rows.span[i] = past;
    }
}

// bounds: room for one entry per token of a's row.
inline RowResult align_row(const Rows& a, const Rows& b, int64_t r, int64_t* bounds) {
    Cursor x(a, r), y(b, r);
    RowResult out;
    int64_t closed = 0;
    bool same = true;
    while (!x.done() || !y.done()) {
        const bool take_x = !x.done() && (x.end() <= y.end() || y.done());
        Cursor& behind = take_x ? x : y;
        if (!behind.take(static_cast<int32_t>(out.spans))) {
            (take_x ? out.bad_a : out.bad_b) = behind.next() - (take_x ? a : b).row[r];
            return out;
        }
        const int64_t n = std::min(x.left(), y.left());
        if (n > 0) {
            if (same) {
                same = std::memcmp(x.at(), y.at(), static_cast<size_t>(n)) == 0;
                out.equal += same ? n : std::mismatch(x.at(), x.at() + n, y.at()).first - x.at();
            }
            x.consume(n), y.consume(n);
        }
        if (x.end() == y.end() && x.end() > closed) bounds[out.spans++] = closed = x.end();
    }
    out.end_a = x.end(), out.end_b = y.end();
    close_row(a, r, out.end_a, closed, static_cast<int32_t>(out.spans));
    close_row(b, r, out.end_b, closed, static_cast<int32_t>(out.spans));
    return out;
}

}  // namespace reflux
