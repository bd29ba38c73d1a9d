// What a C++ program does with the library of -DREFLUX_AOT=ON: spans of two tokenizations on the CPU, and, where a GPU is, the forward
// KL of two rows. tests/kernels/test_aot.py builds and runs it; the device memory comes from the driver, so that no CUDA toolkit is
// needed.
#include <dlfcn.h>
#include <reflux/align.hpp>
#include <reflux_kernels.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <vector>

namespace {

template <typename F>
F symbol(void* driver, const char* name) {
    return reinterpret_cast<F>(dlsym(driver, name));
}

// kl of C rows of V logits, by one launch and a few numbers of each row; a negative number: no GPU was used.
int forward_kl(const std::vector<float>& z, const std::vector<float>& u, int C, int V, std::vector<double>& kl) {
    void* driver = dlopen("libcuda.so.1", RTLD_NOW);
    if (!driver) return REFLUX_NO_DRIVER;
    const auto init = symbol<int (*)(unsigned)>(driver, "cuInit");
    const auto retain = symbol<int (*)(void**, int)>(driver, "cuDevicePrimaryCtxRetain");
    const auto current = symbol<int (*)(void*)>(driver, "cuCtxSetCurrent");
    const auto allocate = symbol<int (*)(void**, size_t)>(driver, "cuMemAlloc_v2");
    const auto to_device = symbol<int (*)(void*, const void*, size_t)>(driver, "cuMemcpyHtoD_v2");
    const auto to_host = symbol<int (*)(void*, const void*, size_t)>(driver, "cuMemcpyDtoH_v2");
    void *context, *dz, *du, *dstats;
    std::vector<float> stats(5 * static_cast<size_t>(C));
    const size_t bytes = sizeof(float) * z.size();
    if (init(0) || retain(&context, 0) || current(context)) return REFLUX_NO_DRIVER;
    if (allocate(&dz, bytes) || allocate(&du, bytes) || allocate(&dstats, sizeof(float) * stats.size())) return 2;
    if (to_device(dz, z.data(), bytes) || to_device(du, u.data(), bytes)) return 2;
    const int error = reflux_kl_stats_forward_f32(dz, du, dstats, V, V, C, V, 1.0f, 1.0f, static_cast<uint32_t>(C), nullptr);
    if (error) return error;
    if (to_host(stats.data(), dstats, sizeof(float) * stats.size())) return 2;
    for (int t = 0; t < C; ++t) {
        const double max_z = stats[t], max_u = stats[C + t], sum_z = stats[2 * C + t], sum_u = stats[3 * C + t], w = stats[4 * C + t];
        kl.push_back(w / sum_u + (max_z + std::log(sum_z)) - (max_u + std::log(sum_u)));
    }
    return 0;
}

double reference(const float* z, const float* u, int V) {
    double sum_z = 0, sum_u = 0, kl = 0;
    for (int v = 0; v < V; ++v) sum_z += std::exp(double{z[v]}), sum_u += std::exp(double{u[v]});
    for (int v = 0; v < V; ++v) kl += std::exp(double{u[v]}) / sum_u * ((u[v] - std::log(sum_u)) - (z[v] - std::log(sum_z)));
    return kl;
}

}  // namespace

int main() {
    // "abcabc" as a|bc|a|bc and as abc|abc
    const uint8_t bytes_a[] = {'a', 'b', 'c'}, bytes_b[] = {'a', 'b', 'c'};
    const int64_t begin_a[] = {0, 1, 3}, begin_b[] = {0, 3}, row_a[] = {0, 4}, row_b[] = {0, 2};
    const int32_t ids_a[] = {0, 1, 0, 1}, ids_b[] = {0, 0};
    const reflux::Table table_a(bytes_a, begin_a, 2), table_b(bytes_b, begin_b, 1);
    int32_t span_a[4], span_b[2];
    int64_t bounds[4];
    const reflux::TokenRows a{table_a, ids_a, row_a, nullptr, 0, span_a}, b{table_b, ids_b, row_b, nullptr, 0, span_b};
    reflux::Scratch scratch(a, b);
    const auto found = reflux::align_row(a, b, 0, bounds, scratch);
    std::printf("%d spans: %d %d %d %d and %d %d\n", static_cast<int>(found.spans), span_a[0], span_a[1], span_a[2], span_a[3], span_b[0], span_b[1]);

    const int C = 2, V = 5000;
    std::vector<float> z, u;
    for (int i = 0; i < C * V; ++i) z.push_back(std::sin(0.1f * static_cast<float>(i))), u.push_back(std::cos(0.3f * static_cast<float>(i)));
    std::vector<double> kl;
    const int error = forward_kl(z, u, C, V, kl);
    if (error < 0) return std::printf("no GPU\n"), 0;
    if (error) return std::printf("error %d of the driver\n", error), 1;
    for (int t = 0; t < C; ++t) {
        const double want = reference(z.data() + t * V, u.data() + t * V, V);
        std::printf("kl %.6f, want %.6f\n", kl[static_cast<size_t>(t)], want);
        if (std::abs(kl[static_cast<size_t>(t)] - want) > 1e-4) return 1;
    }
    return 0;
}
