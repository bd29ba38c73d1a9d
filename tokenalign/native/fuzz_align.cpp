// Fuzzes the aligner against its definition: spans by set intersection, bytes by concatenation. Aborts at the first difference.
//   with clang: cmake -DREFLUX_FUZZ=ON, then ./fuzz_align -max_total_time=300 CORPUS      (libFuzzer)
//   with g++:   cmake -DREFLUX_FUZZ=ON, then ./fuzz_align SECONDS [SEED]                  (inputs drawn from a generator)
#include "align.hpp"

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <set>
#include <string>

namespace {

using reflux::EndRows, reflux::RowResult, reflux::TokenRows;

void require(bool holds, const char* what) {
    if (holds) return;
    std::fprintf(stderr, "fuzz_align: %s\n", what);
    std::abort();
}

// The fuzzer's bytes, zeros when they run out.
struct Source {
    const uint8_t* at;
    const uint8_t* end;
    uint8_t byte() { return at < end ? *at++ : uint8_t{0}; }
    bool empty() const { return at == end; }
};

// One tokenization of some rows, and what it means.
struct Side {
    std::vector<uint8_t> bytes;
    std::vector<int64_t> begin = {0}, row = {0}, trim;
    std::vector<int32_t> ids;
    std::vector<int64_t> ends;  // by definition; -1 for a masked token
    std::vector<std::string> texts;
    int64_t bad_row = -1, bad_at = -1;  // of the first id that is not in the table

    void add_token(const std::string& piece, bool trimmed) {
        if (trimmed) trim.push_back(static_cast<int64_t>(ids.size())), bytes.push_back(' ');
        bytes.insert(bytes.end(), piece.begin(), piece.end());
        begin.push_back(static_cast<int64_t>(bytes.size()));
        ids.push_back(static_cast<int32_t>(begin.size() - 2));
    }

    // Cuts `text` by a short pattern of lengths, so that few input bytes make rows of many windows.
    void add_row(const std::string& text, Source& in) {
        std::vector<uint8_t> pattern(1 + in.byte() % 8);
        for (uint8_t& x : pattern) x = in.byte();
        const size_t longest = in.byte() % 4 == 0 ? 60 : 6;
        size_t at = 0;
        for (size_t i = 0; at < text.size() || i < pattern.size(); ++i) {
            const uint8_t x = pattern[i % pattern.size()];
            const size_t piece = std::min(x % (longest + 1) + (i >= pattern.size() ? 1 : 0), text.size() - at);
            if (x >= 240) {
                ids.push_back(-1), ends.push_back(-1);
                if (i < 2 * pattern.size()) continue;  // a pattern of masked tokens alone would not end
            }
            add_token(text.substr(at, piece), x % 16 == 5 && piece > 0);
            at += piece;
            ends.push_back(static_cast<int64_t>(at));
        }
        texts.push_back(text);
        row.push_back(static_cast<int64_t>(ids.size()));
    }

    void break_id(Source& in) {
        if (ids.empty()) return;
        const auto at = static_cast<int64_t>((in.byte() * 256 + in.byte()) % static_cast<int>(ids.size()));
        ids[static_cast<size_t>(at)] = in.byte() % 2 ? static_cast<int32_t>(begin.size()) - 1 + in.byte() : -2 - in.byte();
        bad_row = std::upper_bound(row.begin(), row.end(), at) - row.begin() - 1;
        bad_at = at - row[static_cast<size_t>(bad_row)];
    }

    reflux::Table table() const { return {bytes.data(), begin.data(), static_cast<int64_t>(begin.size()) - 1}; }
};

// bounds and, for either side, the span of each token: the sentences of spans.py's docstring.
void check_row(const Side& a, const Side& b, size_t r, const RowResult& got, const std::vector<int64_t>& bounds,
               const std::vector<int32_t>& span_a, const std::vector<int32_t>& span_b) {
    std::set<int64_t> common, of_b;
    const auto rows_of = [r](const Side& s) { return std::pair{s.row[r], s.row[r + 1]}; };
    for (auto [i, last] = rows_of(b); i < last; ++i) of_b.insert(b.ends[static_cast<size_t>(i)]);
    for (auto [i, last] = rows_of(a); i < last; ++i)
        if (const int64_t end = a.ends[static_cast<size_t>(i)]; end > 0 && of_b.count(end)) common.insert(end);
    const std::vector<int64_t> want(common.begin(), common.end());
    require(got.spans == static_cast<int64_t>(want.size()), "another number of spans");
    require(std::equal(want.begin(), want.end(), bounds.begin() + a.row[r]), "other boundaries");
    for (const auto& [side, span] : {std::pair{&a, &span_a}, std::pair{&b, &span_b}}) {
        const bool whole = !want.empty() && static_cast<int64_t>(side->texts[r].size()) == want.back();
        int64_t start = 0;
        for (auto [i, last] = rows_of(*side); i < last; ++i) {
            const int64_t end = side->ends[static_cast<size_t>(i)];
            int64_t k = std::upper_bound(want.begin(), want.end(), start) - want.begin();
            if (k == got.spans) k = whole ? k - 1 : -1;
            require((*span)[static_cast<size_t>(i)] == (end < 0 ? -1 : k), "another span");
            if (end >= 0) start = end;
        }
    }
    require(got.end_a == static_cast<int64_t>(a.texts[r].size()) && got.end_b == static_cast<int64_t>(b.texts[r].size()), "other ends");
}

template <typename Rows>
void check(const Side& a, const Side& b, const Rows& rows_a, const Rows& rows_b, const std::vector<int32_t>& span_a,
           const std::vector<int32_t>& span_b) {
    reflux::Scratch scratch(rows_a, rows_b);
    std::vector<int64_t> bounds(a.row.back() > 0 ? static_cast<size_t>(a.row.back()) : 0);
    for (size_t r = 0; r + 1 < a.row.size(); ++r) {
        const RowResult got = reflux::align_row(rows_a, rows_b, static_cast<int64_t>(r), bounds.data() + a.row[r], scratch);
        const bool bad_a = Rows::SPELLS && a.bad_row == static_cast<int64_t>(r), bad_b = Rows::SPELLS && b.bad_row == static_cast<int64_t>(r);
        require(got.bad_a == (bad_a ? a.bad_at : -1) && got.bad_b == (bad_b ? b.bad_at : -1), "another bad token");
        if (bad_a || bad_b) continue;
        check_row(a, b, r, got, bounds, span_a, span_b);
        const std::string &one = a.texts[r], &two = b.texts[r];
        const size_t n = std::min(one.size(), two.size());
        const auto agree = std::mismatch(one.begin(), one.begin() + static_cast<std::ptrdiff_t>(n), two.begin()).first - one.begin();
        require(got.equal == (Rows::SPELLS ? agree : 0), "another number of equal bytes");
    }
}

void run(const uint8_t* data, size_t size) {
    Source in{data, data + size};
    Side a, b;
    const uint8_t flags = in.byte();
    for (int r = 0; r < 1 + flags % 3; ++r) {
        std::string unit, text;
        for (int n = in.byte() % 64; n > 0; --n) unit += static_cast<char>(in.byte());
        for (int n = flags & 4 ? 1 + in.byte() : 1; n > 0; --n) text += unit;
        std::string other = text;
        const uint8_t change = in.byte();
        if (change % 4 == 1 && !other.empty()) other[(in.byte() * 256u + in.byte()) % other.size()] ^= static_cast<char>(1 + in.byte() % 255);
        if (change % 4 == 2) other.resize(std::min<size_t>(other.size(), in.byte()));
        if (change % 4 == 3) other += "tail";
        a.add_row(text, in), b.add_row(other, in);
    }
    if (flags & 8) a.break_id(in);
    if (flags & 16) b.break_id(in);
    const reflux::Table table_a = a.table(), table_b = b.table();
    std::vector<int32_t> span_a(a.ids.size()), span_b(b.ids.size());
    check(a, b, TokenRows{table_a, a.ids.data(), a.row.data(), a.trim.data(), static_cast<int64_t>(a.trim.size()), span_a.data()},
          TokenRows{table_b, b.ids.data(), b.row.data(), b.trim.data(), static_cast<int64_t>(b.trim.size()), span_b.data()}, span_a, span_b);
    check(a, b, EndRows{a.ends.data(), a.row.data(), span_a.data()}, EndRows{b.ends.data(), b.row.data(), span_b.data()}, span_a, span_b);
}

}  // namespace

#ifdef REFLUX_LIBFUZZER
extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    run(data, size);
    return 0;
}
#else
int main(int argc, char** argv) {
    const double seconds = argc > 1 ? std::atof(argv[1]) : 10;
    std::mt19937_64 random(argc > 2 ? std::strtoull(argv[2], nullptr, 10) : 0);
    const auto start = std::chrono::steady_clock::now();
    long long inputs = 0, bytes = 0;
    for (; std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count() < seconds; ++inputs) {
        std::vector<uint8_t> input(random() % 256);
        for (uint8_t& x : input) x = static_cast<uint8_t>(random());
        run(input.data(), input.size());
        bytes += static_cast<long long>(input.size());
    }
    std::printf("%lld inputs, %lld bytes, no finding\n", inputs, bytes);
}
#endif
