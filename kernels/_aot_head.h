/* Row kernels of reflux for NVIDIA GPUs, as functions of device pointers. reflux.kernels._aot fills in the
   declarations and writes reflux_kernels.h.

   Every function returns 0, an error of the CUDA driver, or REFLUX_NO_DRIVER, REFLUX_NO_CODE (this
   GPU is none of the architectures that the library was built for). `programs` is the number of
   rows (of span_sum: of groups of 32 spans), `stream` a CUstream or cudaStream_t. The calling
   thread has a current CUDA context.

   Row kernels, C rows of V logits z (student) and u (teacher); rows lie stride_z, stride_u apart:
     kl_stats     stats [5, C]: max z, max u, sum e^(z - max z), sum e^(u - max u), w. With
                  lse = log sum + max, each logit multiplied by mul (1 / temperature):
                  forward  kl = w / sum u + lse z - lse u,  G = -1
                  reverse  kl = w / sum z - (lse z - lse u),  G = kl
     kl_losses    jsd and skew: sums [2, C]: kl, G
     kl_gradient  dz = coeff * dkl / dz; a row whose kl is not finite gets zeros
     logprob_stats     chosen [C], the target's logit; max, sum e^(x - max), sum e^(x - max)(x - max)
     logprob_gradient  dx = g_logp 1[target] + g_all p - g_entropy p (log p + entropy)
   One target a row, int64, -1 for an ignored row. */
#pragma once
#include <stdint.h>
#ifdef __cplusplus
extern "C" {
#endif
enum { REFLUX_NO_DRIVER = -1, REFLUX_NO_CODE = -2 };
@DECLARATIONS@
#ifdef __cplusplus
}
#endif
