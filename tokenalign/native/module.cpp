// reflux.tokenalign._native: checks the arrays, lets go of the GIL, shares the rows among threads. spans.py is the caller.
#include "align.hpp"

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <atomic>
#include <memory>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

namespace nb = nanobind;

namespace {

template <typename T>
using Array = nb::ndarray<const T, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
template <typename T>
using NewArray = nb::ndarray<nb::numpy, T, nb::ndim<1>>;

// An array for Python that is not zeroed first: at 10^8 tokens that would be a second pass over its memory.
template <typename T>
class Output {
  public:
    explicit Output(size_t size) : size_(size), values_(new T[size]) {}

    T* data() { return values_.get(); }
    T& operator[](size_t i) { return values_[i]; }

    NewArray<T> release() {
        T* values = values_.release();
        nb::capsule owner(values, [](void* p) noexcept { delete[] static_cast<T*>(p); });
        return NewArray<T>(values, {size_}, owner);
    }

  private:
    size_t size_;
    std::unique_ptr<T[]> values_;
};

[[noreturn]] void refuse(const std::string& message) { throw nb::value_error(("align: " + message).c_str()); }

// Starts at 0, never falls, ends at `last`: what every offset below relies on to stay inside its array.
void check_offsets(const Array<int64_t>& offsets, size_t last, const std::string& name) {
    const int64_t* at = offsets.data();
    const size_t n = offsets.size();
    if (n == 0 || at[0] != 0 || at[n - 1] != static_cast<int64_t>(last) || !std::is_sorted(at, at + n))
        refuse(name + " must rise from 0 to " + std::to_string(last));
}

void check_rows(const Array<int64_t>& row, size_t tokens, const std::string& side) {
    check_offsets(row, tokens, "row_" + side);
    for (size_t r = 0; r + 1 < row.size(); ++r)
        if (row.data()[r + 1] - row.data()[r] > std::numeric_limits<int32_t>::max())
            refuse("row " + std::to_string(r) + " has more tokens than an int32 counts");
}

void check_trim(const Array<int64_t>& trim, size_t tokens, const std::string& side) {
    const int64_t* at = trim.data();
    const size_t n = trim.size();
    if (n > 0 && (at[0] < 0 || at[n - 1] >= static_cast<int64_t>(tokens) || !std::is_sorted(at, at + n)))
        refuse("trim_" + side + " must be rising positions within the " + std::to_string(tokens) + " tokens");
}

reflux::Table make_table(const Array<uint8_t>& bytes, const Array<int64_t>& begin) {
    check_offsets(begin, bytes.size(), "begin");
    if (begin.size() - 1 > static_cast<size_t>(std::numeric_limits<int32_t>::max())) refuse("a table has more ids than an int32 counts");
    return {bytes.data(), begin.data(), static_cast<int64_t>(begin.size()) - 1};
}

template <typename Work>
void share(size_t threads, const Work& work) {
    std::vector<std::thread> pool;
    try {
        for (size_t i = 1; i < threads; ++i) pool.emplace_back(work, i);
    } catch (const std::system_error&) {
        // fewer threads than asked for: the rows are handed out one by one, so the work is still complete
    }
    work(size_t{0});
    for (auto& thread : pool) thread.join();
}

// Aligns every row. a, b: called with the array to put the spans in, give TokenRows or EndRows. bad: names a token that cannot be.
template <typename MakeA, typename MakeB, typename Bad>
nb::tuple align(const MakeA& make_a, const MakeB& make_b, const Array<int64_t>& row_a, const Array<int64_t>& row_b, int64_t threads,
                const Bad& bad) {
    if (row_a.size() != row_b.size())
        refuse(std::to_string(row_a.size() - 1) + " rows against " + std::to_string(row_b.size() - 1));
    if (threads < 1) refuse("threads must be at least 1");
    const size_t rows = row_a.size() - 1;
    const auto tokens_a = static_cast<size_t>(row_a.data()[rows]), tokens_b = static_cast<size_t>(row_b.data()[rows]);
    Output<int32_t> span_a(tokens_a), span_b(tokens_b);
    Output<int64_t> bounds(tokens_a), spans(rows), equal(rows), end_a(rows), end_b(rows);
    std::vector<reflux::RowResult> results(rows);
    {
        nb::gil_scoped_release unlocked;
        const auto a = make_a(span_a.data());
        const auto b = make_b(span_b.data());
        const size_t workers = std::max<size_t>(1, std::min(static_cast<size_t>(threads), rows));
        std::vector<reflux::Scratch> scratch(workers, reflux::Scratch(a, b));
        std::atomic<size_t> next{0};
        share(workers, [&](size_t worker) {
            for (size_t r; (r = next.fetch_add(1)) < rows;)
                results[r] = reflux::align_row(a, b, static_cast<int64_t>(r), bounds.data() + a.row[r], scratch[worker]);
        });
    }
    for (size_t r = 0; r < rows; ++r) {
        const reflux::RowResult& row = results[r];
        if (row.bad_a >= 0) bad("a", r, row.bad_a);
        if (row.bad_b >= 0) bad("b", r, row.bad_b);
        spans[r] = row.spans, equal[r] = row.equal, end_a[r] = row.end_a, end_b[r] = row.end_b;
    }
    return nb::make_tuple(span_a.release(), span_b.release(), bounds.release(), spans.release(), equal.release(), end_a.release(),
                          end_b.release());
}

std::string place(const char* side, size_t row, int64_t position) {
    return std::string("side ") + side + ", row " + std::to_string(row) + ", position " + std::to_string(position) + ": ";
}

nb::tuple align_ids(const reflux::Table& table_a, Array<int32_t> ids_a, Array<int64_t> row_a, Array<int64_t> trim_a,
                    const reflux::Table& table_b, Array<int32_t> ids_b, Array<int64_t> row_b, Array<int64_t> trim_b, int64_t threads) {
    check_rows(row_a, ids_a.size(), "a"), check_rows(row_b, ids_b.size(), "b");
    check_trim(trim_a, ids_a.size(), "a"), check_trim(trim_b, ids_b.size(), "b");
    const auto rows_of = [](const reflux::Table& table, const Array<int32_t>& ids, const Array<int64_t>& row, const Array<int64_t>& trim) {
        return [&table, &ids, &row, &trim](int32_t* span) {
            return reflux::TokenRows{table, ids.data(), row.data(), trim.data(), static_cast<int64_t>(trim.size()), span};
        };
    };
    return align(rows_of(table_a, ids_a, row_a, trim_a), rows_of(table_b, ids_b, row_b, trim_b), row_a, row_b, threads,
                 [&](const char* side, size_t r, int64_t position) {
                     const bool is_a = side[0] == 'a';
                     const int64_t at = (is_a ? row_a : row_b).data()[r] + position;
                     refuse(place(side, r, position) + "id " + std::to_string((is_a ? ids_a : ids_b).data()[at]) +
                            " is outside its table of " + std::to_string((is_a ? table_a : table_b).size()) + " ids (-1 masks a token)");
                 });
}

nb::tuple align_ends(Array<int64_t> end_a, Array<int64_t> row_a, Array<int64_t> end_b, Array<int64_t> row_b, int64_t threads) {
    check_rows(row_a, end_a.size(), "a"), check_rows(row_b, end_b.size(), "b");
    const auto rows_of = [](const Array<int64_t>& end, const Array<int64_t>& row) {
        return [&end, &row](int32_t* span) { return reflux::EndRows{end.data(), row.data(), span}; };
    };
    return align(rows_of(end_a, row_a), rows_of(end_b, row_b), row_a, row_b, threads, [](const char* side, size_t r, int64_t position) {
        refuse(place(side, r, position) + "the token ends before the one in front of it (-1 masks a token)");
    });
}

// The bytes of `ids`, one after the other.
nb::bytes spell(const reflux::Table& table, Array<int32_t> ids) {
    std::vector<uint8_t> text(ids.size() * 6 + static_cast<size_t>(table.longest() + reflux::Table::SLACK));
    size_t at = 0;
    for (size_t i = 0; i < ids.size(); ++i) {
        const int32_t id = ids.data()[i];
        if (!table.knows(id)) refuse("id " + std::to_string(id) + " at position " + std::to_string(i) + " is outside its table of " +
                                     std::to_string(table.size()) + " ids");
        const size_t room = at + static_cast<size_t>(table.longest() + reflux::Table::SLACK);
        if (text.size() < room) text.resize(2 * room);
        at += static_cast<size_t>(table.spell(id, text.data() + at));
    }
    return nb::bytes(text.data(), at);
}

// -1 where `keep` is 0, else the id; -1 stays.
NewArray<int32_t> mask(Array<int32_t> ids, Array<uint8_t> keep) {
    Output<int32_t> out(ids.size());
    for (size_t i = 0; i < ids.size(); ++i) {
        const int32_t id = ids.data()[i];
        if (id < -1 || (id >= 0 && static_cast<size_t>(id) >= keep.size()))
            refuse("id " + std::to_string(id) + " at position " + std::to_string(i) + " is outside its table of " +
                   std::to_string(keep.size()) + " ids");
        out[i] = id >= 0 && keep.data()[id] ? id : -1;
    }
    return out.release();
}

}  // namespace

NB_MODULE(_native, module) {
    using nb::arg;
    nb::class_<reflux::Table>(module, "Table", "What each id spells; a copy of the arrays, laid out for the aligner.")
        .def(nb::new_(&make_table), arg("bytes").noconvert(), arg("begin").noconvert(),
             "bytes: uint8, all pieces. begin: int64 [V + 1], where each begins.")
        .def("spell", &spell, arg("ids").noconvert(), "The bytes of int32 `ids`; -1 spells none.")
        .def("__len__", &reflux::Table::size);
    module.def("mask", &mask, arg("ids").noconvert(), arg("keep").noconvert(), "int32 ids; -1 where uint8 keep[id] is 0.");
    module.def("align_ids", &align_ids, arg("table_a"), arg("ids_a").noconvert(), arg("row_a").noconvert(), arg("trim_a").noconvert(),
               arg("table_b"), arg("ids_b").noconvert(), arg("row_b").noconvert(), arg("trim_b").noconvert(), arg("threads"),
               "Spans of concatenated rows: (span_a, span_b, bounds, spans, equal, end_a, end_b). Row r is ids[row[r] : row[r + 1]], its\n"
               "boundaries are bounds[row_a[r] : row_a[r] + spans[r]]. trim: tokens whose first byte is left out. Arrays must be\n"
               "contiguous and of the exact dtype; nothing is cast.");
    module.def("align_ends", &align_ends, arg("end_a").noconvert(), arg("row_a").noconvert(), arg("end_b").noconvert(),
               arg("row_b").noconvert(), arg("threads"),
               "As align_ids, from the byte at which each token ends; -1 masks a token. No bytes are compared: equal is 0.");
}
