/* How a function of the library finds its machine code and launches it: the head of reflux_kernels.c. */
#include "reflux_kernels.h"
#include <dlfcn.h>
#include <pthread.h>
#include <stddef.h>

#define DEVICES 64 /* of one process */
typedef struct {
    int capability, aligned;
    const void* cubin;
    const char* name;
    unsigned threads, shared;
    void* function[DEVICES];
    void* module[DEVICES];
} Code;

static int (*get_device)(int*);
static int (*get_attribute)(int*, int, int);
static int (*load_data)(void**, const void*);
static int (*get_function)(void**, void*, const char*);
static int (*launch_kernel)(void*, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, void*, void**,
                            void**);
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static int find_driver(void) {
    if (launch_kernel) return 0;
    void* driver = dlopen("libcuda.so.1", RTLD_NOW);
    if (!driver) return REFLUX_NO_DRIVER;
    *(void**)&get_device = dlsym(driver, "cuCtxGetDevice");
    *(void**)&get_attribute = dlsym(driver, "cuDeviceGetAttribute");
    *(void**)&load_data = dlsym(driver, "cuModuleLoadData");
    *(void**)&get_function = dlsym(driver, "cuModuleGetFunction");
    *(void**)&launch_kernel = dlsym(driver, "cuLaunchKernel");
    return get_device && get_attribute && load_data && get_function && launch_kernel ? 0 : REFLUX_NO_DRIVER;
}

/* The code of this GPU: the same major version, the newest minor one that is not newer. */
static int find_code(Code* codes, size_t n, int aligned, int* device, Code** found) {
    int major = 0, minor = 0, error = find_driver();
    if (!error) error = get_device(device);
    if (!error) error = get_attribute(&major, 75, *device);
    if (!error) error = get_attribute(&minor, 76, *device);
    if (error) return error;
    if (*device >= DEVICES) return REFLUX_NO_CODE;
    *found = NULL;
    for (size_t i = 0; i < n; ++i) {
        Code* code = codes + i;
        int fits = code->capability / 10 == major && code->capability % 10 <= minor && code->aligned == aligned;
        if (fits && (!*found || code->capability > (*found)->capability)) *found = code;
    }
    return *found ? 0 : REFLUX_NO_CODE;
}

static int launch(Code* codes, size_t n, int aligned, void** arguments, unsigned programs, void* stream) {
    int device = 0;
    Code* code = NULL;
    if (!programs) return 0;
    pthread_mutex_lock(&lock);
    int error = find_code(codes, n, aligned, &device, &code);
    if (!error && !code->function[device]) {
        error = load_data(&code->module[device], code->cubin);
        if (!error) error = get_function(&code->function[device], code->module[device], code->name);
    }
    pthread_mutex_unlock(&lock);
    if (error) return error;
    return launch_kernel(code->function[device], programs, 1, 1, code->threads, 1, 1, code->shared, stream, arguments, 0);
}
