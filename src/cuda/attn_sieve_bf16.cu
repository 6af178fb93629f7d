/* SPDX-License-Identifier: Apache-2.0 */
#include "attn_settle.cuh"

extern "C" void emxi_cuda_attn_sieve_bf16(const emxi_cuda_attn *a, unsigned sequences, void *stream) {
  sift<__nv_bfloat16>(*a, sequences, (cudaStream_t)stream);
}
