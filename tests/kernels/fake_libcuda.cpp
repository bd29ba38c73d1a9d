// A CUDA driver without a GPU for test_aot.py: memory is the host's, and a launch of kl_stats is computed here from the arguments that
// arrive, so that wrong or misplaced ones give a wrong KL. Says what was launched.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

template <typename T>
T at(void** arguments, int i) {
    T value;
    std::memcpy(&value, arguments[i], sizeof(T));
    return value;
}

extern "C" {
int cuInit(unsigned) { return 0; }
int cuDevicePrimaryCtxRetain(void** context, int) { return *context = context, 0; }
int cuCtxSetCurrent(void*) { return 0; }
int cuCtxGetDevice(int* device) { return *device = 0; }
int cuDeviceGetAttribute(int* value, int attribute, int) {
    const char* capability = std::getenv("FAKE_CAPABILITY");
    const int both = std::atoi(capability ? capability : "90");
    *value = attribute == 75 ? both / 10 : both % 10;
    return 0;
}
int cuMemAlloc_v2(void** pointer, size_t bytes) { return *pointer = std::aligned_alloc(16, (bytes + 15) / 16 * 16), 0; }
int cuMemcpyHtoD_v2(void* to, const void* from, size_t bytes) { return std::memcpy(to, from, bytes), 0; }
int cuMemcpyDtoH_v2(void* to, const void* from, size_t bytes) { return std::memcpy(to, from, bytes), 0; }
int cuModuleLoadData(void** module, const void* image) { return *module = const_cast<void*>(image), std::memcmp(image, "\177ELF", 4); }
int cuModuleGetFunction(void** function, void* module, const char* name) {
    return *function = module, std::strcmp(name, "kl_stats");
}

int cuLaunchKernel(void*, unsigned x, unsigned y, unsigned z, unsigned threads, unsigned, unsigned, unsigned shared, void*, void** a, void**) {
    const float *logits_z = at<const float*>(a, 0), *logits_u = at<const float*>(a, 1);
    float* stats = at<float*>(a, 2);
    const auto stride_z = at<int64_t>(a, 3), stride_u = at<int64_t>(a, 4);
    const auto C = at<int32_t>(a, 5), V = at<int32_t>(a, 6);
    const float mul_z = at<float>(a, 7), mul_u = at<float>(a, 8);
    std::printf("launch %u %u %u of %u threads, %u bytes shared, scratch %p %p\n", x, y, z, threads, shared, at<void*>(a, 9), at<void*>(a, 10));
    for (unsigned t = 0; t < x; ++t) {
        float max_z = -INFINITY, max_u = -INFINITY, sum_z = 0, sum_u = 0, w = 0;
        const float *p = logits_z + t * stride_z, *q = logits_u + t * stride_u;
        for (int v = 0; v < V; ++v) max_z = std::fmax(max_z, p[v] * mul_z), max_u = std::fmax(max_u, q[v] * mul_u);
        for (int v = 0; v < V; ++v) {
            const float e = std::exp(q[v] * mul_u - max_u);
            sum_z += std::exp(p[v] * mul_z - max_z), sum_u += e, w += e * (q[v] * mul_u - p[v] * mul_z);
        }
        const float row[] = {max_z, max_u, sum_z, sum_u, w};
        for (int i = 0; i < 5; ++i) stats[i * C + static_cast<int>(t)] = row[i];
    }
    return 0;
}
}
