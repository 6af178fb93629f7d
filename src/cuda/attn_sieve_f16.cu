/* SPDX-License-Identifier: Apache-2.0 */
#include "attn_settle.cuh"

extern "C" void emxi_cuda_attn_sieve_f16(const emxi_cuda_attn *a, unsigned sequences, void *stream) {
  sift<__half>(*a, sequences, (cudaStream_t)stream);
}
