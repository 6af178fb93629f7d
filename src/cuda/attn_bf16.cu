/* SPDX-License-Identifier: Apache-2.0 */
#include "attn_bwd.cuh"

extern "C" void emxi_cuda_attn_bf16(const emxi_cuda_attn *a, void *stream) { attend<__nv_bfloat16>(*a, stream); }
