// reflux.tokenalign._native: checks the arrays, lets go of the GIL, shares the rows among threads. spans.py is the caller.
#include "align.hpp"

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <atomic>
#include <limits>
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

template <typename T>
NewArray<T> to_numpy(std::vector<T>&& values) {
    auto* kept = new std::vector<T>(std::move(values));
    nb::capsule owner(kept, [](void* p) noexcept { delete static_cast<std::vector<T>*>(p); });
    return NewArray<T>(kept->data(), {kept->size()}, owner);
}

[[noreturn]] void refuse(const std::string& message) { throw nb::value_error(("align_rows: " + message).c_str()); }

// Starts at 0, never falls, ends at `last`: what every offset below relies on to stay inside its array.
void check_offsets(const Array<int64_t>& offsets, size_t last, const std::string& name) {
    const int64_t* at = offsets.data();
    const size_t n = offsets.size();
    if (n == 0 || at[0] != 0 || at[n - 1] != static_cast<int64_t>(last) || !std::is_sorted(at, at + n))
        refuse(name + " must rise from 0 to " + std::to_string(last));
}

struct Input {
    Array<uint8_t> bytes;
    Array<int64_t> begin;
    Array<int32_t> ids;
    Array<int64_t> row;
    Array<int32_t> skip;

    size_t rows() const { return skip.size(); }

    void check(const std::string& side) const {
        check_offsets(begin, bytes.size(), "begin_" + side);
        check_offsets(row, ids.size(), "row_" + side);
        if (row.size() != rows() + 1) refuse("row_" + side + " must have one entry more than skip_" + side);
        for (size_t r = 0; r < rows(); ++r) {
            if (skip.data()[r] < 0) refuse("skip_" + side + " is below 0 in row " + std::to_string(r));
            if (row.data()[r + 1] - row.data()[r] > std::numeric_limits<int32_t>::max())
                refuse("row " + std::to_string(r) + " has more tokens than an int32 counts");
        }
    }

    reflux::Rows with(std::vector<int32_t>& span) const {
        return {{bytes.data(), begin.data(), static_cast<int64_t>(begin.size()) - 1}, ids.data(), row.data(), skip.data(),
                span.data()};
    }
};

void check_ids(const Input& input, const std::string& side, int64_t row, int64_t position) {
    if (position < 0) return;
    refuse("side " + side + ", row " + std::to_string(row) + ", position " + std::to_string(position) + ": id " +
           std::to_string(input.ids.data()[input.row.data()[row] + position]) + " is outside its table of " +
           std::to_string(input.begin.size() - 1) + " ids (-1 masks a token)");
}

template <typename Work>
void share(int64_t threads, const Work& work) {
    std::vector<std::thread> pool;
    try {
        for (int64_t i = 1; i < threads; ++i) pool.emplace_back(work);
    } catch (const std::system_error&) {
        // fewer threads than asked for: the rows are handed out one by one, so the work is still complete
    }
    work();
    for (auto& thread : pool) thread.join();
}

nb::tuple align_rows(Array<uint8_t> bytes_a, Array<int64_t> begin_a, Array<int32_t> ids_a, Array<int64_t> row_a,
                     Array<int32_t> skip_a, Array<uint8_t> bytes_b, Array<int64_t> begin_b, Array<int32_t> ids_b,
                     Array<int64_t> row_b, Array<int32_t> skip_b, int64_t threads) {
    const Input a{bytes_a, begin_a, ids_a, row_a, skip_a}, b{bytes_b, begin_b, ids_b, row_b, skip_b};
    a.check("a"), b.check("b");
    if (a.rows() != b.rows()) refuse(std::to_string(a.rows()) + " rows against " + std::to_string(b.rows()));
    if (threads < 1) refuse("threads must be at least 1");

    const auto rows = static_cast<int64_t>(a.rows());
    std::vector<int32_t> span_a(ids_a.size()), span_b(ids_b.size());
    std::vector<int64_t> bounds(ids_a.size());
    std::vector<reflux::RowResult> results(a.rows());
    {
        nb::gil_scoped_release unlocked;
        const reflux::Rows side_a = a.with(span_a), side_b = b.with(span_b);
        std::atomic<int64_t> next{0};
        share(std::min(threads, rows), [&] {
            for (int64_t r; (r = next.fetch_add(1)) < rows;)
                results[static_cast<size_t>(r)] = reflux::align_row(side_a, side_b, r, bounds.data() + side_a.row[r]);
        });
    }
    std::vector<int64_t> spans, equal, end_a, end_b;
    for (int64_t r = 0; r < rows; ++r) {
        const reflux::RowResult& row = results[static_cast<size_t>(r)];
        check_ids(a, "a", r, row.bad_a), check_ids(b, "b", r, row.bad_b);
        spans.push_back(row.spans), equal.push_back(row.equal);
        end_a.push_back(row.end_a), end_b.push_back(row.end_b);
    }
    return nb::make_tuple(to_numpy(std::move(span_a)), to_numpy(std::move(span_b)), to_numpy(std::move(bounds)),
                          to_numpy(std::move(spans)), to_numpy(std::move(equal)), to_numpy(std::move(end_a)),
                          to_numpy(std::move(end_b)));
}

}  // namespace

NB_MODULE(_native, module) {
    using nb::arg;
    module.def("align_rows", &align_rows, arg("bytes_a").noconvert(), arg("begin_a").noconvert(), arg("ids_a").noconvert(),
               arg("row_a").noconvert(), arg("skip_a").noconvert(), arg("bytes_b").noconvert(), arg("begin_b").noconvert(),
               arg("ids_b").noconvert(), arg("row_b").noconvert(), arg("skip_b").noconvert(), arg("threads"),
               "Spans of concatenated rows: (span_a, span_b, bounds, spans, equal, end_a, end_b). Row r's boundaries are\n"
               "bounds[row_a[r] : row_a[r] + spans[r]]. Arrays must be contiguous and of the exact dtype; nothing is cast.");
}
